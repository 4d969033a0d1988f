//! `midge token`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CliError, print};
use crate::http::tokens::{self, Scope, Tokens};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a token and show it; nobody can show it again
    Add {
        #[command(flatten)]
        file: FileArgument,
        /// What to call it, such as who has it
        name: String,
        /// What it is good for: to look, or to change things as well
        #[arg(long, default_value = "read")]
        scope: Scope,
    },
    /// Remove a token
    Remove {
        #[command(flatten)]
        file: FileArgument,
        /// Its name
        name: String,
    },
    /// List the tokens
    List {
        #[command(flatten)]
        file: FileArgument,
    },
}

#[derive(Args, Debug)]
pub(super) struct FileArgument {
    /// The tokens file that http.tokens_file names
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

pub(super) fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Add {
            file: FileArgument { file },
            name,
            scope,
        } => print(&format!("{}\n", tokens::add(&file, &name, scope)?)),
        Command::Remove {
            file: FileArgument { file },
            name,
        } => {
            tokens::remove(&file, &name)?;
            print(&format!(
                "token `{name}` was removed from {}; restart midge to shut it out\n",
                file.display()
            ))
        }
        Command::List {
            file: FileArgument { file },
        } => {
            let tokens = Tokens::read(&file)?;
            let lines = tokens
                .iter()
                .map(|(name, scope)| format!("{name}\t{scope}\n"));
            print(&lines.collect::<String>())
        }
    }
}
