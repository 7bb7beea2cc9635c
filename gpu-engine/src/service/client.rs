//! The foreground's side.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use thiserror::Error;
use ttrpc::context;

use super::generated::engine as pb;
use super::generated::engine_ttrpc::EngineClient;
use super::short_path;
use crate::job::{CheckpointJob, CheckpointReport, RestoreJob, RestoreReport};
use crate::keeper::Keeper;
use crate::progress::Step;

/// The worker could not be asked, or its answer makes no sense.
#[derive(Debug, Error)]
pub enum ClientError {
    /// It did not come up. Nothing was asked of it.
    #[error("the checkpoint worker did not come up: {0}")]
    NeverCame(String),
    /// It is gone.
    #[error("the checkpoint worker is gone: {0}")]
    Gone(String),
    /// It answered: this is its one line.
    #[error("{0}")]
    Refused(String),
}

/// What the lower runtime said and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LowerOutput {
    /// Exit status; 0 on success or if it did not run.
    pub status: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// A connection to a worker.
#[derive(Clone)]
pub struct Client(EngineClient);

fn gone(e: impl std::fmt::Display) -> ClientError {
    ClientError::Gone(e.to_string())
}

fn forever() -> context::Context {
    context::Context::default()
}

fn answer<T: serde::de::DeserializeOwned>(error: String, report: &str) -> Result<T, ClientError> {
    if error.is_empty() {
        serde_json::from_str(report).map_err(gone)
    } else {
        Err(ClientError::Refused(error))
    }
}

impl Client {
    /// Connects to a keeper's worker, which may still be starting.
    pub async fn connect(keeper: &Keeper, patience: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            let connected =
                short_path(&keeper.socket).and_then(|(_folder, short)| UnixStream::connect(short));
            match connected {
                Ok(stream) => {
                    stream.set_nonblocking(true).map_err(gone)?;
                    let stream = tokio::net::UnixStream::from_std(stream).map_err(gone)?;
                    let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::new(stream));
                    return Ok(Client(EngineClient::new(client)));
                }
                Err(_) if keeper.has_ended() => return Err(ClientError::Gone("it ended at once".into())),
                Err(e) if Instant::now() > deadline => return Err(ClientError::NeverCame(e.to_string())),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// Runs a checkpoint to its end.
    pub async fn checkpoint(
        &self,
        job: &CheckpointJob,
    ) -> Result<(Result<CheckpointReport, ClientError>, LowerOutput), ClientError> {
        let job = serde_json::to_string(job).map_err(gone)?;
        let request = pb::CheckpointRequest { job, ..Default::default() };
        let response = self.0.checkpoint(forever(), &request).await.map_err(gone)?;
        let lower = LowerOutput {
            status: response.lower_status,
            stdout: response.lower_stdout,
            stderr: response.lower_stderr,
        };
        Ok((answer(response.error, &response.report), lower))
    }

    /// Begins a restore; returns when nothing is left that could be refused.
    pub async fn restore(&self, job: &RestoreJob) -> Result<(), ClientError> {
        let job = serde_json::to_string(job).map_err(gone)?;
        let request = pb::RestoreRequest { job, ..Default::default() };
        let response = self.0.restore(forever(), &request).await.map_err(gone)?;
        if response.error.is_empty() { Ok(()) } else { Err(ClientError::Refused(response.error)) }
    }

    /// Completes a restore once the lower runtime has rebuilt the processes.
    pub async fn attach(&self, init_pid: i32) -> Result<RestoreReport, ClientError> {
        let request = pb::AttachRequest { init_pid, ..Default::default() };
        let response = self.0.attach(forever(), &request).await.map_err(gone)?;
        answer(response.error, &response.report)
    }

    /// Calls `show` for every piece of progress until the job ends.
    pub async fn watch(&self, mut show: impl FnMut(&str, Step)) -> Result<(), ClientError> {
        let request = pb::StatusRequest::default();
        let mut stream = self.0.watch(forever(), &request).await.map_err(gone)?;
        while let Some(p) = stream.recv().await.map_err(gone)? {
            let step = Step {
                name: "",
                done: p.done_bytes,
                total: p.total_bytes,
                elapsed_ms: p.elapsed_ms,
                finished: p.finished,
            };
            show(&p.step, step);
        }
        Ok(())
    }
}
