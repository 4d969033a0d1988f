//! What systemd is told of this process (sd_notify(3)); without systemd, nothing.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use tokio::time::sleep;

/// Where systemd listens.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// Microseconds after which a silent process is taken for a stuck one.
const WATCHDOG_VARIABLE: &str = "WATCHDOG_USEC";

pub(crate) const READY: &str = "READY=1";
pub(crate) const RELOADING: &str = "RELOADING=1";
pub(crate) const STOPPING: &str = "STOPPING=1";
const ALIVE: &str = "WATCHDOG=1";

pub(crate) fn notify(state: &str) {
    let Some(socket) = std::env::var_os(SOCKET_VARIABLE) else {
        return;
    };
    if let Err(error) = send(&socket, state) {
        tracing::warn!(event = "systemd_not_notified", state, %error);
    }
}

fn send(socket: &std::ffi::OsStr, state: &str) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    // Who does not read must not hold the broker up.
    sender.set_nonblocking(true)?;
    #[cfg(target_os = "linux")]
    if let Some(name) = socket.as_encoded_bytes().strip_prefix(b"@") {
        use std::os::linux::net::SocketAddrExt;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        return sender.send_to_addr(state.as_bytes(), &address).map(drop);
    }
    sender.send_to(state.as_bytes(), socket).map(drop)
}

/// Says that the process is alive for as long as the runtime can run this; twice as often as
/// systemd asks for. Does not return.
pub(crate) async fn keep_watchdog_quiet() -> Infallible {
    let limit = std::env::var(WATCHDOG_VARIABLE).ok();
    let limit = limit.and_then(|limit| limit.parse().ok());
    let Some(limit) = limit.map(Duration::from_micros) else {
        return std::future::pending().await;
    };
    loop {
        notify(ALIVE);
        sleep(limit / 2).await;
    }
}
