//! SIGINT, SIGTERM and SIGHUP; and SIGXFSZ, which is no longer one.
//!
//! A signal ends the process at once, unless the command asked for [`flag`] because it has threads to stop: then the
//! first signal sets the flag and the second ends the process. Either way the exit status is 130 and no temporary
//! file stays, but a part from which `--resume` goes on.

use kestrel_formats::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Somebody looks at [`INTERRUPTED`].
static WATCHED: AtomicBool = AtomicBool::new(false);
/// The file being written, whose temporary lies beside it.
static OUTPUT: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Starts to listen, on a thread of its own.
pub fn install() -> Result<()> {
    let failed = |e: std::io::Error| Error::new(ErrorKind::Limit).what("listening for signals").found(e);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let listen = move || {
        for _ in signals.forever() {
            let first = !INTERRUPTED.swap(true, Ordering::SeqCst);
            if !(first && WATCHED.load(Ordering::SeqCst)) {
                remove_temporary();
                std::process::exit(ErrorKind::Interrupted.exit_status().into());
            }
        }
    };
    // Writing beyond a limit on the size of files would end the process; so it is an error of that write.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(failed)?;
    std::thread::Builder::new().name("kestrel-signals".into()).spawn(listen).map_err(failed)?;
    Ok(())
}

/// True once the user wants to stop. The caller promises to look at it often.
pub fn flag() -> &'static AtomicBool {
    WATCHED.store(true, Ordering::SeqCst);
    &INTERRUPTED
}

/// Says which file is being written.
pub fn writing(output: &Path) {
    *OUTPUT.lock().unwrap_or_else(|e| e.into_inner()) = Some(output.to_owned());
}

/// An error if the user wants to stop.
pub fn check() -> Result<()> {
    match flag().load(Ordering::SeqCst) {
        true => Err(Error::new(ErrorKind::Interrupted)),
        false => Ok(()),
    }
}

/// Removes what `formats::atomic_file` or `atomic_folder` has under way: `.NAME.kestrel-partial-PID[-N]`.
fn remove_temporary() {
    let Some(output) = OUTPUT.lock().unwrap_or_else(|e| e.into_inner()).take() else { return };
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let ours = format!(".kestrel-partial-{}", std::process::id());
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = name.to_string_lossy().rsplit_once(&ours).is_some_and(|(_, end)| {
            end.is_empty() || end.strip_prefix('-').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        });
        if is_ours {
            let _ = std::fs::remove_file(entry.path()).or_else(|_| std::fs::remove_dir_all(entry.path()));
        }
    }
}
