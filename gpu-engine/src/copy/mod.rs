//! The copy pipeline: which bytes are saved already, which are to be copied, and copying them.
//!
//! ```text
//! Ledger   every chunk of all memory: digest and place of its saved bytes, if it has been saved        (pure)
//! Scanner  digests of all chunks as they are now, computed on the GPUs
//! Spare    memory on the GPUs that keeps chunks as they were when the program stood still
//! Lanes    threads that move chunks to the image: GPU → page-locked buffers → files
//! Session  one checkpoint: rounds while the program runs, what is left when it stands still, the drain
//! load     the way back: files → page-locked buffers → GPU, proven there
//! ```
//!
//! While a program runs, a chunk is copied to a page-locked buffer and digested there: whatever the program did
//! meanwhile, the digest is that of the bytes which were saved. When the program stands still, a chunk whose digest is the
//! saved one's is saved, and any other is copied again. So no write is missed, by whatever means it was made.
//!
//! Nothing but plain copies is asked of the GPU while the program runs, except a scan between two rounds: two processes'
//! kernels do not run side by side, the GPU switches between them (measured on an H200: a digest kernel for every 8 MiB
//! took 13 to 30 % off the program's rate).

mod lanes;
mod ledger;
mod load;
mod scan;
mod session;
mod spare;

pub use lanes::{Lanes, Ring, Tuning, lane_count};
pub use ledger::{Block, BlockId, ChunkRef, Ledger};
pub use load::{Regions, load, regions};
pub use scan::Scanner;
pub use session::{Quiesced, Session};
pub use spare::Spare;
