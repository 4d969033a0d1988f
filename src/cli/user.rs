//! `midge user`

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{CliError, print};
use crate::auth::edit::{EditError, Editor};
use crate::auth::password::PasswordHash;
use crate::auth::users::UsersFile;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Add a user, or change the password of one
    ///
    /// The password is asked for twice on a terminal, and otherwise read from the first line of
    /// stdin. It is never an argument, since everybody on the machine can see those.
    Add {
        #[command(flatten)]
        file: FileArgument,
        /// Name of the user
        name: String,
        /// Read the password from the first line of this file
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
    },
    /// Remove a user
    Remove {
        #[command(flatten)]
        file: FileArgument,
        /// Name of the user
        name: String,
    },
    /// List the users
    List {
        #[command(flatten)]
        file: FileArgument,
    },
}

#[derive(Args, Debug)]
pub(super) struct FileArgument {
    /// The users file that auth.users_file names
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

/// There is no password to work with.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPassword {
    #[error("the password is empty")]
    Empty,
    #[error("the two passwords are not the same; nothing was changed")]
    Different,
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot read the password: {0}")]
    Read(io::Error),
}

pub(super) fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Add {
            file: FileArgument { file },
            name,
            password_file,
        } => {
            let mut editor = Editor::open(&file)?;
            let password = read_password(&name, password_file)?;
            let is_new = editor.set_password(&name, &PasswordHash::create(password.as_bytes())?)?;
            editor.save()?;
            let done = if is_new {
                "added"
            } else {
                "given a new password"
            };
            print(&format!(
                "user `{name}` was {done} in {}; restart midge to use it\n",
                file.display()
            ))
        }
        Command::Remove {
            file: FileArgument { file },
            name,
        } => {
            let mut editor = Editor::open(&file)?;
            editor.remove(&name)?;
            editor.save()?;
            print(&format!(
                "user `{name}` was removed from {}; restart midge to shut it out\n",
                file.display()
            ))
        }
        Command::List {
            file: FileArgument { file },
        } => {
            let users = UsersFile::read(&file).map_err(EditError::from)?.users;
            let line = |(name, user): (&String, &crate::auth::users::User)| {
                let scheme = user
                    .password
                    .as_ref()
                    .map_or("certificate only", |password| password.hash.scheme());
                format!("{name}\t{scheme}\n")
            };
            print(&users.iter().map(line).collect::<String>())
        }
    }
}

fn read_password(name: &str, file: Option<PathBuf>) -> Result<String, NoPassword> {
    let password = match file {
        Some(path) => {
            let text =
                fs::read_to_string(&path).map_err(|source| NoPassword::File { path, source })?;
            text.lines().next().unwrap_or_default().to_owned()
        }
        None if io::stdin().is_terminal() => {
            let ask = |prompt: String| rpassword::prompt_password(prompt).map_err(NoPassword::Read);
            let password = ask(format!("Password for {name}: "))?;
            if ask("The same again: ".to_owned())? != password {
                return Err(NoPassword::Different);
            }
            password
        }
        None => {
            let mut line = String::new();
            io::stdin()
                .lock()
                .read_line(&mut line)
                .map_err(NoPassword::Read)?;
            line.trim_end_matches(['\r', '\n']).to_owned()
        }
    };
    if password.is_empty() {
        Err(NoPassword::Empty)
    } else {
        Ok(password)
    }
}
