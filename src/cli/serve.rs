//! `midge serve`

use clap::Args;

use super::{CliError, ConfigArguments, check};
use crate::config::Loaded;
use crate::{server, telemetry};

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Log more: -v for single clients, -vv for everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

pub(super) fn run(arguments: Arguments) -> Result<(), CliError> {
    let Arguments {
        mut config,
        verbose,
    } = arguments;
    let level = match verbose {
        0 => None,
        1 => Some("info,midge=debug"),
        _ => Some("debug,midge=trace"),
    };
    config
        .set
        .extend(level.map(|level| ("log.level".to_owned(), level.to_owned())));

    let loaded = Loaded::new(&config.sources())?;
    check::check_files(&loaded)?;
    telemetry::start(&loaded.config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("midge")
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(server::run(loaded.config))?;
    Ok(())
}
