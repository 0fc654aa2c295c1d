//! What Linux says about memory, in files of `/proc`. Elsewhere nothing is known.

/// The number of KiB on the line that begins with `name`, in bytes; `None` where there is no such file or line.
pub fn kib_line(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes of memory that can be had without swapping.
pub fn available_bytes() -> Option<u64> {
    kib_line("/proc/meminfo", "MemAvailable:")
}

#[cfg(test)]
mod tests {
    use super::{available_bytes, kib_line};

    #[test]
    fn linux_knows_its_memory() {
        if cfg!(target_os = "linux") {
            assert!(kib_line("/proc/self/status", "RssAnon:").unwrap() > 0);
            assert!(available_bytes().unwrap() > 1 << 20);
        }
        assert_eq!(kib_line("/proc/self/status", "NoSuchLine:"), None);
        assert_eq!(kib_line("/no/such/file", "RssAnon:"), None);
    }
}
