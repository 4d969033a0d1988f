//! How a client command ends: its exit code, and what a person is told.

use std::fmt::{Arguments, Display};
use std::io::{self, Write};
use std::process::ExitCode;

use super::options::OptionsError;

/// Runs `command` to its exit code, and tells a person about its error.
pub(in crate::cli) fn run<E: Display>(
    command: impl Future<Output = Result<ExitCode, E>>,
    is_quiet: bool,
) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start the runtime: {error}"), is_quiet),
    };
    let exit_code = runtime
        .block_on(command)
        .unwrap_or_else(|error| fail(&error, is_quiet));
    // A thread that waits for a terminal or a pipe must not keep the process alive.
    runtime.shutdown_background();
    exit_code
}

/// Tells what is wrong with the flags of `midge {subcommand}`.
pub(in crate::cli) fn refuse_options(
    error: &OptionsError,
    subcommand: &str,
    is_quiet: bool,
) -> ExitCode {
    if !error.is_wrong_use() {
        return fail(error, is_quiet);
    }
    complain(format_args!(
        "error: {error}\n\nFor more information, try 'midge {subcommand} --help'."
    ));
    ExitCode::from(2)
}

fn fail(error: &dyn Display, is_quiet: bool) -> ExitCode {
    if !is_quiet {
        complain(format_args!("error: {error}"));
    }
    ExitCode::FAILURE
}

/// Writes a line to stderr, unless nobody reads it any more.
pub(in crate::cli) fn complain(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
