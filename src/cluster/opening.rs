//! CONNECTs are written to the store in groups: whatever comes while as many groups are being written
//! as the store does well with is the next. Of one client there is one CONNECT at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::metrics::{Operation, StoreTotals};
use crate::store::StoreError;
use crate::store::mongodb::{MongoStore, OpenRequest, OpenedSession};

/// CONNECTs of one group.
const GROUP_MAX: usize = 200;

/// Groups that are written at the same time: the server works on each with one of its threads.
const GROUPS_MAX: usize = 4;

/// CONNECTs that wait; further ones wait to be allowed to wait.
const WAITING_MAX: usize = 10_000;

/// Between attempts to write a group.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Takes sessions from the store.
#[derive(Clone, Debug)]
pub(super) struct Opener(mpsc::Sender<Waiting>);

type Waiting = (OpenRequest, oneshot::Sender<Answer>);

type Answer = Result<Option<OpenedSession>, StoreError>;

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

/// A client that is gone leaves its session taken, as if it had disconnected at once.
fn answer(
    opened: Result<Vec<Option<OpenedSession>>, StoreError>,
    waiting: Vec<oneshot::Sender<Answer>>,
) {
    match opened {
        Ok(opened) => {
            for (opened, waiting) in opened.into_iter().zip(waiting) {
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

impl Opener {
    /// Begins to work; ends when all copies of the opener are gone.
    pub(super) fn start(store: Arc<MongoStore>, totals: Arc<StoreTotals>) -> Self {
        let (sender, mut receiver) = mpsc::channel::<Waiting>(WAITING_MAX);
        tokio::spawn(async move {
            let groups = Arc::new(Semaphore::new(GROUPS_MAX));
            let mut group = Vec::new();
            while let Ok(place) = groups.clone().acquire_owned().await
                && receiver.recv_many(&mut group, GROUP_MAX).await > 0
            {
                let (store, totals) = (store.clone(), totals.clone());
                let (requests, waiting): (Vec<_>, Vec<_>) = group.drain(..).unzip();
                tokio::spawn(async move {
                    let _place = place;
                    answer(open_group(&store, &totals, requests).await, waiting);
                });
            }
        });
        Self(sender)
    }

    /// Takes the session of a client from whoever has it; `None` if somebody has taken it since.
    ///
    /// # Errors
    /// `StoreError` if it is not certain whose the session is now.
    pub(super) async fn open(&self, request: OpenRequest) -> Answer {
        let gone = || StoreError::Unavailable("the node is going down".to_owned());
        let (sender, receiver) = oneshot::channel();
        self.0.send((request, sender)).await.map_err(|_| gone())?;
        receiver.await.unwrap_or_else(|_| Err(gone()))
    }
}
