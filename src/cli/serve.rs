//! `midge serve`

use std::num::NonZero;
use std::{env, io, thread};

use clap::Args;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Builder;

use super::{CliError, ConfigArguments, check};
use crate::config::Loaded;
use crate::{server, telemetry};

/// Sets another number of threads; tokio's own.
const WORKER_THREADS: &str = "TOKIO_WORKER_THREADS";

/// Descriptors that the kernel has room for from the start, for half a megabyte.
const DESCRIPTORS_READY: u64 = 65_536;

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
    make_room_for_connections();
    let mut runtime = Builder::new_multi_thread();
    if env::var_os(WORKER_THREADS).is_none() {
        runtime.worker_threads(worker_threads());
    }
    let runtime = runtime
        .enable_all()
        .thread_name("midge")
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(server::run(loaded))?;
    Ok(())
}

/// Takes as many descriptors as the system gives, and has the kernel's table of them grow now.
///
/// The table doubles when it is full, and where there are threads each time waits until every CPU
/// has let go of the old one (`expand_fdtable` in Linux' `fs/file.c`): some 10 ms in which nobody is
/// served, in the middle of clients that connect.
fn make_room_for_connections() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where it is not allowed, the limit stays as it was.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
    let limit = getrlimit(Resource::Nofile).current;
    let ready = limit.map_or(DESCRIPTORS_READY, |limit| limit.min(DESCRIPTORS_READY));
    if let Ok(last) = i32::try_from(ready.saturating_sub(1)) {
        // Closed again at once: the table does not shrink.
        let _ = fcntl_dupfd_cloexec(io::stderr(), last);
    }
}

/// How many threads serve clients: one for each CPU but one. The kernel's part of the network, the
/// store's threads and password hashing need a CPU as well; and where there are two, a pair of
/// workers that wake each other for every message costs a fifth more CPU per message at low load
/// than one worker (`docs/benchmarks.md`).
fn worker_threads() -> usize {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    cpus.saturating_sub(1).max(1)
}
