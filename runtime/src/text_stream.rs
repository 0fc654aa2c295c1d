//! Token bytes to text that can be shown at once: whole characters only, and nothing that may turn out to be part of
//! a stop string.

/// Gathers the bytes of tokens and gives out text as soon as it is certain.
pub struct TextStream {
    stops: Vec<String>,
    /// Bytes of a character that is not whole yet: at most 3.
    partial: Vec<u8>,
    /// Text held back because a stop string may begin in it.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends at the first of `stop_strings`. Empty ones are ignored.
    pub fn new(stop_strings: &[String]) -> Self {
        let stops = stop_strings.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, partial: Vec::new(), held: String::new(), stopped: false }
    }

    /// Takes the bytes of a token and returns the text that became certain: whole characters, U+FFFD for bytes that
    /// no continuation can make valid, nothing from the start of a stop string on.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.partial.extend_from_slice(bytes);
        let whole = whole_characters(&self.partial);
        let text = String::from_utf8_lossy(&self.partial[..whole]);
        self.held.push_str(&text);
        self.partial.drain(..whole);
        self.release()
    }

    /// Ends the stream: what was held back is certain now, and an unfinished character is U+FFFD. Nothing after a
    /// stop string.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        let rest = std::mem::take(&mut self.partial);
        self.held.push_str(&String::from_utf8_lossy(&rest));
        let mut out = self.release();
        if !self.stopped {
            out.push_str(&std::mem::take(&mut self.held));
        }
        out
    }

    /// Whether a stop string was found. No more text comes then.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Gives out `held` up to the first stop string, or up to where one may begin.
    fn release(&mut self) -> String {
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let keep = self.held.char_indices().map(|(i, _)| i).find(|&i| begins_stop(&self.held[i..]));
        let tail = self.held.split_off(keep.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, tail)
    }
}

/// How many of the first bytes are decided: all but the start of a character that more bytes could complete.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(_) => return bytes.len(),
            Err(e) => {
                at += e.valid_up_to();
                match e.error_len() {
                    Some(invalid) => at += invalid,
                    None => return at,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, String, bool) {
        let mut s = TextStream::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let out = pieces.iter().map(|p| s.push(p)).collect();
        let end = s.finish();
        (out, end, s.stopped())
    }

    /// Every way to cut the bytes in two or three gives the same text.
    #[test]
    fn any_cut_gives_the_same_text() {
        let cases: [(&[u8], &[&str], &str, bool); 9] = [
            ("aé€🦙z".as_bytes(), &[], "aé€🦙z", false),
            (b"a\xFFb\xE2\x82", &[], "a\u{FFFD}b\u{FFFD}", false),
            (b"\xF0\x9F\xA6x", &[], "\u{FFFD}x", false),
            (b"\xC0\xAF", &[], "\u{FFFD}\u{FFFD}", false),
            (b"one\nUser: two", &["User:"], "one\n", true),
            (b"ababac tail", &["abac"], "ab", true),
            (b"abababx", &["abac"], "abababx", false),
            ("x🦙🦙y".as_bytes(), &["🦙y", "zzz"], "x🦙", true),
            (b"ends in a sto", &["stop"], "ends in a sto", false),
        ];
        for (bytes, stops, wanted, stopped) in cases {
            for i in 0..=bytes.len() {
                for j in i..=bytes.len() {
                    let (out, end, was) = stream(stops, &[&bytes[..i], &bytes[i..j], &bytes[j..]]);
                    assert_eq!(
                        (out.concat() + &end, was),
                        (wanted.to_owned(), stopped),
                        "cut at {i} and {j}"
                    );
                }
            }
        }
    }

    #[test]
    fn text_comes_as_soon_as_it_is_certain() {
        let (out, end, _) = stream(&["<end>"], &[b"a", b"\xE2\x82", b"\xACb <e", b"nX", b"\xFF"]);
        assert_eq!(out, ["a", "", "€b ", "<enX", "\u{FFFD}"]);
        assert_eq!(end, "");
    }

    #[test]
    fn the_earliest_stop_string_wins_and_nothing_follows() {
        let mut s = TextStream::new(&["yy".to_owned(), "x".to_owned(), String::new()]);
        assert_eq!(s.push(b"a x yy"), "a ");
        assert!(s.stopped());
        assert_eq!((s.push(b"more"), s.finish()), (String::new(), String::new()));
    }
}
