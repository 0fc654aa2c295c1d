//! How a run that did not succeed ends: one message on stderr and an exit status.

use crate::args::ErrorFormat;
use crate::output;
use clap::error::ErrorKind as ClapKind;
use kestrel_formats::{Error, ErrorKind};
use std::process::ExitCode;
use std::sync::Mutex;

/// What every command returns.
pub type Outcome = Result<(), Failure>;

/// Why a command stopped early.
pub enum Failure {
    /// Something to tell the user.
    Error(Error),
    /// Whoever read stdout has seen enough (`kestrel inspect … | head`). Nothing is wrong and nothing is said.
    StdoutClosed,
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Error(e)
    }
}

/// A bug in Kestrel (EX_SOFTWARE of sysexits.h). Not 2: a script must not take a bug for a bad file.
const STATUS_BUG: u8 = 70;

/// Message and place of the panic that ended the run.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps Rust's own panic message, which means nothing to users, off the screen; [`exit_for_panic`] reports it.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        let mut slot = PANIC.lock().unwrap_or_else(|e| e.into_inner());
        slot.get_or_insert_with(|| info.to_string().replace('\n', " "));
    }));
}

/// Makes a mapped file that is truncated an error like any other, although nothing of this process can go on then.
pub fn report_faults(format: ErrorFormat) -> kestrel_formats::Result<()> {
    kestrel_formats::map::exit_on_fault(match format {
        ErrorFormat::Text => |e| output::printable(&shown(e, ErrorFormat::Text)),
        ErrorFormat::Json => |e| shown(e, ErrorFormat::Json),
    })
}

fn shown(error: &Error, format: ErrorFormat) -> String {
    match format {
        ErrorFormat::Text => format!("error: {error}"),
        ErrorFormat::Json => error.to_json().to_string(),
    }
}

/// Reports a failure.
pub fn exit_for(failure: Failure, format: ErrorFormat) -> ExitCode {
    let Failure::Error(error) = failure else { return ExitCode::SUCCESS };
    output::message(&shown(&error, format));
    ExitCode::from(error.kind().exit_status())
}

/// Reports a panic, which is a bug here whatever the input was.
pub fn exit_for_panic(format: ErrorFormat) -> ExitCode {
    let found = PANIC.lock().unwrap_or_else(|e| e.into_inner()).take().unwrap_or_default();
    let hint = "this is a bug in kestrel: please report it with the command and the file";
    match format {
        ErrorFormat::Text => output::message(&format!("error: {found} ({hint})")),
        ErrorFormat::Json => {
            let json =
                serde_json::json!({"kind": "Bug", "found": found, "hint": hint, "exit_status": STATUS_BUG});
            output::message(&json.to_string());
        }
    }
    ExitCode::from(STATUS_BUG)
}

/// Prints help and version on stdout, and what is wrong with the arguments on stderr.
pub fn exit_for_clap(e: &clap::Error) -> ExitCode {
    match e.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => match output::text(&e.render().to_string()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => exit_for(failure, ErrorFormat::Text),
        },
        _ if json_was_asked_for() => {
            let text = e.render().to_string();
            let text = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
            let error = Error::new(ErrorKind::Usage).what("command line").found(text.replace('\n', " "));
            exit_for(error.into(), ErrorFormat::Json)
        }
        _ => {
            output::message(e.render().to_string().trim_end());
            ExitCode::from(ErrorKind::Usage.exit_status())
        }
    }
}

/// Looks for `--error-format json` in arguments that could not be parsed.
fn json_was_asked_for() -> bool {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    args.iter().any(|a| a == "--error-format=json")
        || args.windows(2).any(|pair| pair[0] == "--error-format" && pair[1] == "json")
}
