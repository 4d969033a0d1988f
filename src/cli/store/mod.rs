//! `midge store`

mod progress;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use self::progress::Display;
use super::{CliError, ConfigArguments, print};
use crate::config::Loaded;
use crate::copy::{Comparison, copy};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Copy everything of an embedded store into MongoDB
    ///
    /// Sessions with their subscriptions, waiting messages and QoS 2 exchanges, Wills, and retained
    /// messages go into the MongoDB that `store.uri` and `store.database` of the configuration
    /// name, which has to be empty. Afterwards both sides are read again and compared.
    ///
    /// Stop the midge that uses the store first, and start none on MongoDB before the copy is done.
    /// The embedded store stays as it is. A copy that was interrupted is simply run again: it begins
    /// anew, and until one has finished no midge starts on that database.
    #[command(after_help = "Example: midge store copy --config cluster.toml --from ./midge-data")]
    Copy(CopyArguments),
}

#[derive(Args, Debug)]
pub(super) struct CopyArguments {
    /// Folder of the embedded store, such as ./midge-data
    #[arg(long, value_name = "FOLDER")]
    from: PathBuf,
    #[command(flatten)]
    config: ConfigArguments,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: Command) -> Result<(), CliError> {
    let Command::Copy(CopyArguments { from, config, json }) = command;
    let loaded = Loaded::new(&config.sources())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    let mut display = Display::new();
    let copying = copy(&loaded.config, &from, |progress| display.show(progress));
    let outcome = runtime.block_on(copying);
    display.finish();

    let comparison = outcome?;
    print(&if json {
        as_json(&comparison)
    } else {
        as_text(&comparison)
    })?;
    if comparison.is_identical() {
        return Ok(());
    }
    for difference in &comparison.described {
        // With nowhere to report to, the exit code has to say it.
        let _ = writeln!(io::stderr(), "{difference}");
    }
    Err(CliError::CopyDiffers(comparison.differences))
}

fn as_text(comparison: &Comparison) -> String {
    let Comparison {
        sessions,
        subscriptions,
        exchanges,
        messages,
        retained,
        expired,
        ..
    } = comparison;
    let mut text = format!(
        "{sessions} sessions, {subscriptions} subscriptions, {exchanges} QoS 2 exchanges, \
         {messages} waiting messages, {retained} retained messages"
    );
    if comparison.is_identical() {
        text.push_str(": identical");
    }
    if *expired > 0 {
        text.push_str(&format!("; {expired} messages have expired"));
    }
    text.push('\n');
    text
}

fn as_json(comparison: &Comparison) -> String {
    let result = json!({
        "identical": comparison.is_identical(),
        "sessions": comparison.sessions,
        "subscriptions": comparison.subscriptions,
        "exchanges": comparison.exchanges,
        "messages": comparison.messages,
        "retained": comparison.retained,
        "expired": comparison.expired,
        "differences": comparison.differences,
    });
    format!("{result}\n")
}
