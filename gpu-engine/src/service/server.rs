//! The worker's side.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};

use super::generated::engine as pb;
use super::generated::engine_ttrpc::{Engine, create_engine};
use super::{LowerOutput, short_path};
use crate::job::{CheckpointJob, CheckpointReport, RestoreJob, RestoreReport};
use crate::progress::{Progress, Step};

/// How often a watcher is told where the job stands.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// What a worker does with the requests. Every method blocks; the service calls them from threads of their own.
pub trait Handler: Send + Sync + 'static {
    /// Runs a checkpoint. Errors are one line for a person; the lower runtime's output comes in any case.
    fn checkpoint(&self, job: CheckpointJob) -> (Result<CheckpointReport, String>, LowerOutput);
    /// Prepares a restore; loading goes on when it returns.
    fn restore(&self, job: RestoreJob) -> Result<(), String>;
    /// Completes a restore.
    fn attach(&self, init_pid: i32) -> Result<RestoreReport, String>;
    /// Where the job stands.
    fn progress(&self) -> &Progress;
    /// The answer to the request is on its way: the worker has nothing left to do.
    fn answered(&self);
}

struct Service<H>(Arc<H>);

fn status_of(step: &Step) -> pb::Progress {
    pb::Progress {
        step: step.name.to_string(),
        done_bytes: step.done,
        total_bytes: step.total,
        elapsed_ms: step.elapsed_ms,
        finished: step.finished,
        ..Default::default()
    }
}

fn internal(e: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, e.to_string()))
}

fn parse<T: serde::de::DeserializeOwned>(text: &str) -> ttrpc::Result<T> {
    serde_json::from_str(text).map_err(internal)
}

#[async_trait]
impl<H: Handler> Engine for Service<H> {
    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: pb::CheckpointRequest,
    ) -> ttrpc::Result<pb::CheckpointResponse> {
        let job = parse(&request.job)?;
        let handler = self.0.clone();
        let (result, lower) =
            tokio::task::spawn_blocking(move || handler.checkpoint(job)).await.map_err(internal)?;
        let (error, report) = match result {
            Ok(report) => (String::new(), serde_json::to_string(&report).map_err(internal)?),
            Err(line) => (line, String::new()),
        };
        self.0.answered();
        Ok(pb::CheckpointResponse {
            error,
            report,
            lower_status: lower.status,
            lower_stdout: lower.stdout,
            lower_stderr: lower.stderr,
            ..Default::default()
        })
    }

    async fn restore(
        &self,
        _: &TtrpcContext,
        request: pb::RestoreRequest,
    ) -> ttrpc::Result<pb::RestoreResponse> {
        let job = parse(&request.job)?;
        let handler = self.0.clone();
        let result = tokio::task::spawn_blocking(move || handler.restore(job)).await.map_err(internal)?;
        if result.is_err() {
            self.0.answered();
        }
        Ok(pb::RestoreResponse { error: result.err().unwrap_or_default(), ..Default::default() })
    }

    async fn attach(
        &self,
        _: &TtrpcContext,
        request: pb::AttachRequest,
    ) -> ttrpc::Result<pb::AttachResponse> {
        let handler = self.0.clone();
        let result =
            tokio::task::spawn_blocking(move || handler.attach(request.init_pid)).await.map_err(internal)?;
        let (error, report) = match result {
            Ok(report) => (String::new(), serde_json::to_string(&report).map_err(internal)?),
            Err(line) => (line, String::new()),
        };
        self.0.answered();
        Ok(pb::AttachResponse { error, report, ..Default::default() })
    }

    async fn status(&self, _: &TtrpcContext, _: pb::StatusRequest) -> ttrpc::Result<pb::Progress> {
        Ok(status_of(&self.0.progress().now()))
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        _: pb::StatusRequest,
        sender: ServerStreamSender<pb::Progress>,
    ) -> ttrpc::Result<()> {
        loop {
            let step = self.0.progress().now();
            sender.send(&status_of(&step)).await?;
            if step.finished {
                return Ok(());
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    }
}

/// Serves at `socket` until `done` completes. The socket appears complete: it is bound elsewhere and renamed.
pub async fn serve<H: Handler>(
    handler: Arc<H>,
    socket: &Path,
    done: impl Future<Output = ()>,
) -> ttrpc::Result<()> {
    let temporary = socket.with_extension("new");
    let _ = std::fs::remove_file(&temporary);
    let (_folder, short) = short_path(&temporary).map_err(internal)?;
    let listener = UnixListener::bind(short).map_err(internal)?;
    listener.set_nonblocking(true).map_err(internal)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(internal)?;
    let mut server = Server::new()
        .add_listener(listener.into())
        .register_service(create_engine(Arc::new(Service(handler))));
    server.start().await?;
    std::fs::rename(&temporary, socket).map_err(internal)?;
    done.await;
    // Leaves the answer time to reach the other side; it closes the connection then.
    let _ = tokio::time::timeout(Duration::from_secs(2), server.shutdown()).await;
    let _ = std::fs::remove_file(socket);
    Ok(())
}
