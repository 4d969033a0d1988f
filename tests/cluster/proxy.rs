//! The network between two programs, when it has to fail.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

/// Forwards connections to an address. All of them end when it is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    state: watch::Sender<State>,
    task: AbortHandle,
}

#[derive(Clone, Copy)]
struct State {
    flow: Flow,
    /// So far. Connections end at the next one, even if it is over before they notice.
    cuts: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Flow {
    /// Each piece of data is held back for this long.
    Forwarding(Duration),
    /// Connections stay open, and nothing comes through.
    Paused,
    Cut,
}

impl Proxy {
    /// On a free port.
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(target));
        let state = watch::Sender::new(State {
            flow: Flow::Forwarding(Duration::ZERO),
            cuts: 0,
        });
        let task = tokio::spawn(serve(listener, target.clone(), state.subscribe()));
        Self {
            address,
            target,
            state,
            task: task.abort_handle(),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forwards connections that are made from now on to another address.
    pub(crate) fn retarget(&self, target: SocketAddr) {
        *self.target.lock() = target;
    }

    /// Keeps all connections open, and new ones too, but lets nothing through: as when a cable is
    /// pulled.
    pub(crate) fn pause(&self) {
        self.state.send_modify(|state| state.flow = Flow::Paused);
    }

    /// Closes all connections, and new ones at once.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| {
            state.flow = Flow::Cut;
            state.cuts += 1;
        });
    }

    /// Holds back each piece of data, and what is behind it, for this long.
    pub(crate) fn delay(&self, delay: Duration) {
        let flow = Flow::Forwarding(delay);
        self.state.send_modify(|state| state.flow = flow);
    }

    /// Undoes all of the others. What a pause has held back goes through.
    pub(crate) fn restore(&self) {
        self.delay(Duration::ZERO);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    listener: TcpListener,
    target: Arc<Mutex<SocketAddr>>,
    state: watch::Receiver<State>,
) {
    // Its connections end with this task.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((client, _)) = listener.accept() => {
                let State { flow, cuts } = *state.borrow();
                if flow == Flow::Cut {
                    continue;
                }
                let (target, state) = (target.clone(), state.clone());
                connections.spawn(async move {
                    let mut cut = state.clone();
                    tokio::select! {
                        // Either end may have closed it.
                        _ = connect(client, &target, state) => {}
                        _ = cut.wait_for(|state| state.cuts > cuts) => {}
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connect(
    client: TcpStream,
    target: &Mutex<SocketAddr>,
    mut state: watch::Receiver<State>,
) -> io::Result<()> {
    delay(&mut state).await;
    let target = *target.lock();
    let server = TcpStream::connect(target).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_input, client_output) = client.into_split();
    let (server_input, server_output) = server.into_split();
    tokio::try_join!(
        forward(client_input, server_output, state.clone()),
        forward(server_input, client_output, state),
    )?;
    Ok(())
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        delay(&mut state).await;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

/// Until what waits here may go on.
async fn delay(state: &mut watch::Receiver<State>) {
    let open = state.wait_for(|state| state.flow != Flow::Paused);
    let flow = open.await.map(|state| state.flow);
    // A cut ends it elsewhere.
    if let Ok(Flow::Forwarding(delay)) = flow
        && !delay.is_zero()
    {
        sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::lines::DEADLINE;

    /// A server that sends back what it receives.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut input, mut output) = stream.split();
                    tokio::io::copy(&mut input, &mut output).await
                });
            }
        });
        address
    }

    async fn round_trip(stream: &mut TcpStream, byte: u8) -> io::Result<()> {
        stream.write_u8(byte).await?;
        assert_eq!(stream.read_u8().await?, byte);
        Ok(())
    }

    #[tokio::test]
    async fn a_paused_connection_stays_open_and_goes_on() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream, 1).await.unwrap();

        proxy.pause();
        stream.write_u8(2).await.unwrap();
        let mut late = TcpStream::connect(proxy.address()).await.unwrap();
        late.write_u8(3).await.unwrap();
        let nothing = Duration::from_millis(50);
        assert!(timeout(nothing, stream.read_u8()).await.is_err());
        assert!(timeout(nothing, late.read_u8()).await.is_err());

        proxy.restore();
        assert_eq!(stream.read_u8().await.unwrap(), 2);
        assert_eq!(late.read_u8().await.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_cut_ends_connections_and_refuses_new_ones() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream, 1).await.unwrap();

        proxy.cut();
        let ended = timeout(DEADLINE, stream.read_u8()).await;
        assert!(ended.expect("the connection ends").is_err());
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(round_trip(&mut refused, 2).await.is_err());

        proxy.restore();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream, 3).await.unwrap();
    }

    #[tokio::test]
    async fn a_delay_holds_data_back() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();

        proxy.delay(Duration::from_millis(20));
        let start = Instant::now();
        round_trip(&mut stream, 1).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(40), "both ways");
    }

    #[tokio::test]
    async fn the_end_of_one_side_reaches_the_other() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();

        stream.shutdown().await.unwrap();
        let end = timeout(DEADLINE, stream.read(&mut [0; 1])).await;
        assert_eq!(end.expect("the end comes").unwrap(), 0);
    }

    #[tokio::test]
    async fn new_connections_go_to_the_new_target() {
        let nowhere = {
            let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
            closed.local_addr().unwrap()
        };
        let proxy = Proxy::start(nowhere).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(round_trip(&mut stream, 1).await.is_err());

        proxy.retarget(echo().await);
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream, 2).await.unwrap();
    }
}
