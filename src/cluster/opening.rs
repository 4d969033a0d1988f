//! CONNECTs are written to the store in groups: whatever comes while one group is being written is
//! the next.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::metrics::{Operation, StoreTotals};
use crate::store::StoreError;
use crate::store::mongodb::{MongoStore, OpenRequest, OpenedSession};

/// CONNECTs of one group.
const GROUP_MAX: usize = 200;

/// CONNECTs that wait; further ones wait to be allowed to wait.
const WAITING_MAX: usize = 10_000;

/// Between attempts to write a group.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Takes sessions from the store.
#[derive(Clone, Debug)]
pub(super) struct Opener(mpsc::Sender<Waiting>);

type Waiting = (
    OpenRequest,
    oneshot::Sender<Result<Option<OpenedSession>, StoreError>>,
);

/// Asks again after what may have been done, which does it no harm: a client that is refused could
/// not know that its session was taken from wherever it was.
async fn open_group(
    store: &MongoStore,
    totals: &StoreTotals,
    requests: Vec<OpenRequest>,
) -> Result<Vec<Option<OpenedSession>>, StoreError> {
    let deadline = Instant::now() + store.timeout();
    loop {
        match store.open(requests.clone()).await {
            Err(error) if error.may_pass() && Instant::now() < deadline => {
                tokio::time::sleep(AGAIN_AFTER).await;
                totals.retries.of(Operation::OpenSession).inc();
            }
            outcome => return outcome,
        }
    }
}

impl Opener {
    /// Begins to work; ends when all copies of the opener are gone.
    pub(super) fn start(store: Arc<MongoStore>, totals: Arc<StoreTotals>) -> Self {
        let (sender, mut receiver) = mpsc::channel::<Waiting>(WAITING_MAX);
        tokio::spawn(async move {
            let mut group = Vec::new();
            while receiver.recv_many(&mut group, GROUP_MAX).await > 0 {
                let (requests, waiting): (Vec<_>, Vec<_>) = group.drain(..).unzip();
                match open_group(&store, &totals, requests).await {
                    Ok(opened) => {
                        for (opened, waiting) in opened.into_iter().zip(waiting) {
                            // A client that is gone leaves its session taken, as if it had
                            // disconnected at once.
                            let _ = waiting.send(Ok(opened));
                        }
                    }
                    Err(error) => {
                        for waiting in waiting {
                            let _ = waiting.send(Err(error.clone()));
                        }
                    }
                }
            }
        });
        Self(sender)
    }

    /// Takes the session of a client from whoever has it; `None` if somebody has taken it since.
    ///
    /// # Errors
    /// `StoreError` if it is not certain whose the session is now.
    pub(super) async fn open(
        &self,
        request: OpenRequest,
    ) -> Result<Option<OpenedSession>, StoreError> {
        let gone = || StoreError::Unavailable("the node is going down".to_owned());
        let (sender, receiver) = oneshot::channel();
        self.0.send((request, sender)).await.map_err(|_| gone())?;
        receiver.await.unwrap_or_else(|_| Err(gone()))
    }
}
