//! What stream-ordered memory must know of a stream: its identity, and when the work queued so far is done.

use std::ptr;

use crate::cache::StreamId;
use crate::cuda::{CAPTURE_RELAXED, Context, SUCCESS, Status, Stream};
use crate::real::api;

/// `CU_STREAM_PER_THREAD`.
const PER_THREAD: usize = 2;
/// `CU_STREAM_LEGACY` and the numbers before it: the default streams, which belong to the current context.
const DEFAULTS: usize = 2;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: u32 = 2;

/// The stream that a call of the `_ptsz` variants means.
pub fn per_thread(stream: Stream) -> Stream {
    if stream.is_null() { PER_THREAD as Stream } else { stream }
}

/// While this lives, the calling thread may call the driver though another thread captures a stream.
pub struct Relaxed(u32);

impl Relaxed {
    /// Begins.
    pub fn new() -> Self {
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: `mode` is valid for reading and writing.
        let result = unsafe { (api().capture_mode)(&mut mode) };
        Relaxed(if result == SUCCESS { mode } else { CAPTURE_RELAXED })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: the mode is valid for reading and writing.
        unsafe { (api().capture_mode)(&mut self.0) };
    }
}

/// Whether the stream is being captured, or cannot say: its memory is then the driver's business.
pub fn is_capturing(stream: Stream) -> bool {
    let mut status = 0;
    // SAFETY: the stream is the caller's, `status` is valid for writing.
    unsafe { (api().stream_capturing)(stream, &mut status) != SUCCESS || status != 0 }
}

/// The context a stream belongs to.
fn context(stream: Stream) -> usize {
    let mut context: Context = ptr::null_mut();
    // SAFETY: the stream is the caller's, `context` is valid for writing.
    unsafe {
        if stream as usize <= DEFAULTS || (api().stream_context)(stream, &mut context) != SUCCESS {
            (api().ctx_get)(&mut context);
        }
    }
    context as usize
}

/// Its identity; none if the driver (before CUDA 12) has no numbers for streams.
pub fn identity(stream: Stream) -> Option<StreamId> {
    let mut number = 0;
    // SAFETY: the stream is the caller's, `number` is valid for writing.
    let result = unsafe { (api().stream_id)(stream, &mut number) };
    (result == SUCCESS).then(|| (context(stream), number))
}

/// An event behind everything queued on a stream so far. Whoever holds it last gives it to [`Mark::destroy`].
#[derive(Debug)]
pub struct Mark {
    /// The context it belongs to.
    pub context: usize,
    /// The event; 0 when its context is gone, and all work with it.
    event: usize,
}

impl Mark {
    /// Records one.
    pub fn record(stream: Stream) -> Result<Mark, Status> {
        let context = context(stream);
        let mut current = ptr::null_mut();
        let mut event = ptr::null_mut();
        // SAFETY: the pointers are valid for writing; the context is the stream's, and is popped again.
        let result = unsafe {
            (api().ctx_get)(&mut current);
            let pushed = current as usize != context && (api().ctx_push)(context as Context) == SUCCESS;
            let mut result = (api().event_create)(&mut event, NO_TIMING);
            if result == SUCCESS {
                result = (api().event_record)(event, stream);
                if result != SUCCESS {
                    (api().event_destroy)(event);
                }
            }
            if pushed {
                (api().ctx_pop)(&mut current);
            }
            result
        };
        if result == SUCCESS { Ok(Mark { context, event: event as usize }) } else { Err(result) }
    }

    /// Whether the work before it is done.
    pub fn is_done(&self) -> bool {
        // SAFETY: the event lives until `destroy`.
        self.event == 0 || unsafe { (api().event_query)(self.event as Stream) } == SUCCESS
    }

    /// Its context has been destroyed.
    pub fn context_is_gone(&mut self) {
        self.event = 0;
    }

    /// Gives the event back.
    pub fn destroy(self) {
        if self.event != 0 {
            // SAFETY: made by `record`, and forgotten here.
            unsafe { (api().event_destroy)(self.event as Stream) };
        }
    }
}
