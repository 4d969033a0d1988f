//! `midge ctl`: what the API of a running node offers, for people and for scripts.
//!
//! It asks one node and shows what that says. Text has the words of the API, so that one can be
//! found in the other.

mod api;
mod table;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use self::api::{Api, encoded};
use self::table::{Table, plain};
use super::healthcheck::reachable;
use super::{CliError, ConfigArguments, print};
use crate::config::Config;
pub(super) use api::ApiError;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Where the node answers HTTP, as http://HOST:PORT; without it, where its configuration says.
    /// The variable MIDGE_CTL_URL can name it too
    #[arg(long, global = true)]
    url: Option<String>,
    /// A file that holds a token. The variable MIDGE_CTL_TOKEN_FILE can name it too
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Show what the API answers, as one line of JSON; of a list, a line for each item
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a summary of the node and its cluster
    Status,
    /// List the nodes of the cluster
    Nodes,
    /// List clients of the whole cluster
    Clients {
        /// Only this one, or, with * at the end, those whose ids begin so
        client_id: Option<String>,
        /// Only those that are connected, or not
        #[arg(long)]
        state: Option<State>,
    },
    /// Show one client with its connection, queue and subscriptions
    Client { client_id: String },
    /// End the connection of a client of this node
    Kick {
        client_id: String,
        /// What a version 5 client is told, such as 0x98, Administrative action, which is the default
        #[arg(long, value_name = "CODE")]
        reason_code: Option<String>,
    },
    /// Show who would get a message to a topic
    Subscribers { topic: String },
    /// List retained messages
    Retained {
        /// Only topics that match this filter
        #[arg(default_value = "#")]
        filter: String,
    },
    /// Clear the retained messages that match a filter
    ClearRetained {
        filter: String,
        /// Only say which ones
        #[arg(long)]
        dry_run: bool,
    },
    /// Send the clients of this node elsewhere, and let nobody in
    Drain {
        /// Return when no client is left
        #[arg(long)]
        wait: bool,
    },
    /// Let clients in again
    Undrain,
    /// Have this node read its files again, as SIGHUP does
    Reload,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    Connected,
    Disconnected,
}

const URL_VARIABLE: &str = "MIDGE_CTL_URL";
const TOKEN_FILE_VARIABLE: &str = "MIDGE_CTL_TOKEN_FILE";

/// Items asked for at a time.
const PAGE: usize = 500;

/// Between two looks at a node that is being drained.
const DRAIN_PAUSE: Duration = Duration::from_millis(500);

pub(super) fn run(arguments: Arguments) -> Result<(), CliError> {
    let Arguments {
        config,
        url,
        token_file,
        json,
        command,
    } = arguments;
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let authority = match url.or_else(|| variable(URL_VARIABLE)) {
        Some(url) => Api::authority_of(&url)?,
        None => {
            let http = Config::load(&config.sources())?.http;
            if !http.enabled {
                return Err(ApiError::NoHttp.into());
            }
            reachable(http.bind).to_string()
        }
    };
    let token_file = token_file.or_else(|| variable(TOKEN_FILE_VARIABLE).map(PathBuf::from));
    let token = token_file.as_deref().map(Api::read_token).transpose()?;
    let ctl = Ctl {
        api: Api::new(authority, token),
        json,
    };
    ctl.carry_out(command)
}

struct Ctl {
    api: Api,
    json: bool,
}

impl Ctl {
    fn carry_out(&self, command: Command) -> Result<(), CliError> {
        match command {
            Command::Status => self.show("/cluster", facts),
            Command::Nodes => {
                let columns = ["number", "name", "state", "this"];
                let nodes = self.api.ask("GET", "/nodes")?;
                self.print_items(&mut Table::new(&columns), &nodes)
            }
            Command::Clients { client_id, state } => {
                let mut query = String::new();
                if let Some(client_id) = client_id {
                    let _ = write!(query, "&client_id={}", encoded(&client_id));
                }
                if let Some(state) = state {
                    let state = match state {
                        State::Connected => "connected",
                        State::Disconnected => "disconnected",
                    };
                    let _ = write!(query, "&state={state}");
                }
                let columns = [
                    "client_id",
                    "state",
                    "node",
                    "protocol",
                    "connection.address",
                    "queue.messages",
                ];
                self.list("/clients", &query, &columns)
            }
            Command::Client { client_id } => {
                self.show(&format!("/clients/{}", encoded(&client_id)), facts)
            }
            Command::Kick {
                client_id,
                reason_code,
            } => {
                let mut path = format!("/clients/{}", encoded(&client_id));
                if let Some(code) = reason_code {
                    let _ = write!(path, "?reason_code={}", encoded(&code));
                }
                self.api.ask("DELETE", &path)?;
                self.say(&format!("client {} was told to go\n", plain(&client_id)))
            }
            Command::Subscribers { topic } => self.show(
                &format!("/subscriptions?matches={}", encoded(&topic)),
                facts,
            ),
            Command::Retained { filter } => {
                let columns = ["topic", "qos", "payload_bytes", "publisher", "expires_at"];
                let query = format!("&filter={}", encoded(&filter));
                self.list("/retained", &query, &columns)
            }
            Command::ClearRetained { filter, dry_run } => self.clear_retained(&filter, dry_run),
            Command::Drain { wait } => self.drain(wait),
            Command::Undrain => self.tell("DELETE", "/drain", |answer| {
                format!("node {} lets clients in\n", text(&answer["node"]))
            }),
            Command::Reload => self.tell("POST", "/reload", |answer| {
                let needs_restart = texts(&answer["needs_restart"]);
                if needs_restart.is_empty() {
                    "the files were read again, and all of them are in effect\n".to_owned()
                } else {
                    let keys = needs_restart.join(", ");
                    format!("the files were read again; these settings need a restart: {keys}\n")
                }
            }),
        }
    }

    fn drain(&self, wait: bool) -> Result<(), CliError> {
        let progress = |answer: &Value| {
            let (node, left) = (text(&answer["node"]), text(&answer["clients_connected"]));
            format!("node {node} is being drained; clients left: {left}\n")
        };
        let mut answer = self.api.ask("POST", "/drain")?;
        self.print(&answer, progress)?;
        while wait && answer["clients_connected"] != 0 {
            thread::sleep(DRAIN_PAUSE);
            let now = self.api.ask("GET", "/drain")?;
            if now["state"] != "draining" {
                return Err(CliError::DrainEnded);
            }
            if now != answer {
                self.print(&now, progress)?;
            }
            answer = now;
        }
        Ok(())
    }

    /// As long as there are more than one request clears.
    fn clear_retained(&self, filter: &str, dry_run: bool) -> Result<(), CliError> {
        let filter = encoded(filter);
        let path = format!("/retained?filter={filter}&dry_run={dry_run}");
        loop {
            let answer = self.api.ask("DELETE", &path)?;
            self.print(&answer, |answer| {
                let mut lines = String::new();
                for topic in texts(&answer["topics"]) {
                    let _ = writeln!(lines, "{topic}");
                }
                let (messages, would) = (
                    text(&answer["messages"]),
                    if dry_run { "would be" } else { "were" },
                );
                let more = if answer["more"] == true {
                    ", and there are more"
                } else {
                    ""
                };
                let _ = writeln!(lines, "{messages} messages {would} cleared{more}");
                lines
            })?;
            if dry_run || answer["more"] != true {
                return Ok(());
            }
        }
    }

    /// Shows an answer as it is.
    fn show(&self, path: &str, as_text: fn(&Value) -> String) -> Result<(), CliError> {
        self.tell("GET", path, as_text)
    }

    fn tell(
        &self,
        method: &str,
        path: &str,
        as_text: impl Fn(&Value) -> String,
    ) -> Result<(), CliError> {
        let answer = self.api.ask(method, path)?;
        self.print(&answer, as_text)
    }

    /// Every page of a list.
    fn list(&self, path: &str, query: &str, columns: &[&'static str]) -> Result<(), CliError> {
        let mut table = Table::new(columns);
        let mut cursor = String::new();
        loop {
            let path = format!("{path}?limit={PAGE}{query}{cursor}");
            let page = self.api.ask("GET", &path)?;
            self.print_items(&mut table, &page)?;
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={}", encoded(next)),
                None => return Ok(()),
            }
        }
    }

    fn print_items(&self, table: &mut Table, page: &Value) -> Result<(), CliError> {
        let items = page["items"].as_array().map_or(&[][..], Vec::as_slice);
        if self.json {
            let lines = items.iter().map(|item| format!("{item}\n"));
            print(&lines.collect::<String>())
        } else {
            print(&table.rows(items))
        }
    }

    fn print(&self, answer: &Value, as_text: impl Fn(&Value) -> String) -> Result<(), CliError> {
        if self.json {
            print(&format!("{answer}\n"))
        } else {
            print(&as_text(answer))
        }
    }

    /// What only people need to hear.
    fn say(&self, sentence: &str) -> Result<(), CliError> {
        if self.json { Ok(()) } else { print(sentence) }
    }
}

/// An object as lines, what is inside of others with a dotted name.
fn facts(answer: &Value) -> String {
    let mut lines = String::new();
    let mut add = |name: &str, value: &Value| {
        let _ = writeln!(lines, "{name}: {}", text(value));
    };
    each_fact("", answer, &mut add);
    lines
}

fn each_fact(name: &str, value: &Value, add: &mut impl FnMut(&str, &Value)) {
    let below = |key: &str| match name {
        "" => key.to_owned(),
        name => format!("{name}.{key}"),
    };
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                each_fact(&below(key), value, add);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (number, item) in items.iter().enumerate() {
                each_fact(&below(&number.to_string()), item, add);
            }
        }
        value => add(name, value),
    }
}

/// A value as people write it, on one line.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => plain(text),
        Value::Array(_) => texts(value).join(", "),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

fn texts(value: &Value) -> Vec<String> {
    let items = value.as_array().map_or(&[][..], Vec::as_slice);
    items.iter().map(text).collect()
}
