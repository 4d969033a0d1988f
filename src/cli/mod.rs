//! The command line: one file per subcommand.
//!
//! Owns the names of commands and flags, the exit codes, and how errors are told to a person. It
//! decides nothing about the broker; `serve` hands a checked configuration to [`crate::server`].

mod check;
mod client;
mod ctl;
mod healthcheck;
mod publish;
mod serve;
mod store;
mod subscribe;
mod token;
mod user;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::auth::edit::EditError;
use crate::auth::password::HashingFailed;
use crate::config::{ConfigError, Sources};
use crate::copy::CopyError;
use crate::http::tokens::TokensError;
use crate::server::StartError;

/// An MQTT broker that loses nothing it acknowledged.
#[derive(Debug, Parser)]
#[command(name = "midge", version, args_conflicts_with_subcommands = true)]
#[command(
    after_help = "Without a command, midge serves MQTT on 127.0.0.1:1883 and HTTP on \
                  127.0.0.1:9883. Other ports: --set listeners.tcp.bind=127.0.0.1:1884 --set \
                  http.bind=127.0.0.1:9884. What else can be set: midge check."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Arguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker (the default)
    Serve(serve::Arguments),
    /// Check the configuration and show what is in effect
    Check(ConfigArguments),
    /// Add, remove and list the users of a users file
    #[command(subcommand)]
    User(user::Command),
    /// Add, remove and list the tokens that let programs use the HTTP API
    #[command(subcommand)]
    Token(token::Command),
    /// Look at a node that runs, and steer it, over its HTTP API
    Ctl(ctl::Arguments),
    /// Ask the midge that runs with this configuration whether it is ready: exit code 0 or 1
    Healthcheck(healthcheck::Arguments),
    /// Copy the store of a single node into MongoDB
    #[command(subcommand)]
    Store(store::Command),
    /// Publish messages, as mosquitto_pub does
    Pub(publish::Arguments),
    /// Subscribe and show what comes, as mosquitto_sub does
    Sub(subscribe::Arguments),
    /// Show the version
    Version,
}

/// Where the configuration comes from.
#[derive(Args, Debug)]
struct ConfigArguments {
    /// Configuration file; the variable MIDGE_CONFIG can name it too
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key, such as limits.connections_max=1000; more than once if needed
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

impl ConfigArguments {
    fn sources(self) -> Sources {
        Sources::from_process(self.config, self.set)
    }
}

fn key_and_value(argument: &str) -> Result<(String, String), &'static str> {
    let (key, value) = argument.split_once('=').ok_or("write it as KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

/// Why a command failed; its text is what the person gets to read.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Start(Box<StartError>),
    #[error(transparent)]
    Users(#[from] EditError),
    #[error(transparent)]
    Hashing(#[from] HashingFailed),
    #[error(transparent)]
    Password(#[from] user::NoPassword),
    #[error(transparent)]
    Tokens(#[from] TokensError),
    #[error(transparent)]
    Unhealthy(#[from] healthcheck::Unhealthy),
    #[error(transparent)]
    Api(#[from] ctl::ApiError),
    #[error(
        "the node is not being drained any more: it was told to end, or to let clients in again"
    )]
    DrainEnded,
    #[error(transparent)]
    Copy(Box<CopyError>),
    #[error(
        "the copy is not the same in {0} places; no midge will start on it: find out why, and run \
         the copy again"
    )]
    CopyDiffers(u64),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        Self::Start(Box::new(error))
    }
}

impl From<CopyError> for CliError {
    fn from(error: CopyError) -> Self {
        Self::Copy(Box::new(error))
    }
}

/// Runs the command of this process. Exit codes: 0 done, 1 failed, 2 wrong use.
pub fn main() -> ExitCode {
    // Ends the process itself on `--help` (0) and wrong use (2).
    let cli = Cli::parse();
    let outcome = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::User(command) => user::run(command),
        Command::Token(command) => token::run(command),
        Command::Ctl(arguments) => ctl::run(arguments),
        Command::Healthcheck(arguments) => healthcheck::run(arguments),
        Command::Store(command) => store::run(command),
        // The flags of these two, and their exit codes, are those of mosquitto's programs.
        Command::Pub(arguments) => return publish::run(arguments),
        Command::Sub(arguments) => return subscribe::run(arguments),
        Command::Version => print(&format!("midge {}\n", env!("CARGO_PKG_VERSION"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With nowhere to report to, the exit code has to say it.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the output of a command. A reader that has gone, such as `head`, is no failure.
fn print(text: &str) -> Result<(), CliError> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Output(error)),
        _ => Ok(()),
    }
}
