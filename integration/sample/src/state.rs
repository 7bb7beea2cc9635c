//! The program's state on the GPU.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::cuda::{Access, Cuda, Handle, Prop};
use crate::model::Line;

/// The kernels.
pub const PTX: &str = include_str!("../kernels/sample.ptx");
/// Granularity of the virtual-memory calls.
const BLOCK: u64 = 2 << 20;
/// Largest plain allocation.
const LARGE: u64 = 32 << 20;
/// Small allocations that one step changes.
const WINDOW: usize = 1000;

struct Buffer {
    address: u64,
    words: usize,
    line: Line,
}

/// Everything on the GPU, and what it must look like.
pub struct State<'a> {
    cuda: &'a Cuda,
    advance: Handle,
    combine: Handle,
    count: Handle,
    spin: Handle,
    generation: u64,
    streams: [Handle; 2],
    event: Handle,
    buffers: Vec<Buffer>,
    /// Many allocations of a few bytes, of which each step changes the next [`WINDOW`].
    small: Vec<Buffer>,
    /// The running sum of the first buffer.
    sum: Buffer,
    flag: *const AtomicU32,
    steps: u32,
}

impl<'a> State<'a> {
    /// Allocates about `bytes` of GPU memory, and `small` allocations of 4 to 1024 bytes beside them.
    pub fn allocate(cuda: &'a Cuda, bytes: u64, small: usize) -> Result<Self> {
        let mut device = 0;
        cuda.device_get(&mut device, 0)?;
        let mut context = ptr::null_mut();
        cuda.primary_retain(&mut context, device)?;
        cuda.set_current(context)?;
        let image = CString::new(PTX)?;
        let mut module = ptr::null_mut();
        cuda.module_load(&mut module, image.as_ptr().cast())?;
        let function = |name: &CStr| {
            let mut handle = ptr::null_mut();
            cuda.function(&mut handle, module, name.as_ptr()).map(|()| handle)
        };
        let (mut generation, mut size) = (0, 0);
        cuda.variable(&mut generation, &mut size, module, c"generation".as_ptr())?;
        let mut streams = [ptr::null_mut(); 2];
        for stream in &mut streams {
            cuda.stream_create(stream, 1)?;
        }
        let mut event = ptr::null_mut();
        cuda.event_create(&mut event, 2)?;
        let mut flag = ptr::null_mut();
        cuda.host_alloc(&mut flag, 4, 0)?;
        let mut state = State {
            cuda,
            advance: function(c"advance")?,
            combine: function(c"combine")?,
            count: function(c"count_generation")?,
            spin: function(c"spin")?,
            generation,
            streams,
            event,
            buffers: Vec::new(),
            small: Vec::new(),
            sum: Buffer { address: 0, words: 1000, line: Line::default() },
            flag: flag.cast(),
            steps: 0,
        };
        // Small ones of odd sizes, memory from the program's own virtual-memory calls, a stream-ordered allocation,
        // and plain ones for the rest.
        for words in [1000, 1, 70_001] {
            state.plain(words)?;
        }
        state.sum = state.make(1000, |cuda, at, len| cuda.alloc(at, len))?;
        state.virtual_memory(device, 2 * BLOCK)?;
        let stream = state.streams[0];
        let pooled = state.make(100_000, |cuda, at, len| cuda.alloc_async(at, len, stream))?;
        state.buffers.push(pooled);
        let mut left = bytes.saturating_sub(6 << 20);
        while left >= 1 << 20 {
            let size = left.min(LARGE);
            state.plain((size / 4) as usize)?;
            left -= size;
        }
        for i in 0..small {
            let buffer = state.make(1 + i * 37 % 256, |cuda, at, len| cuda.alloc(at, len))?;
            state.small.push(buffer);
        }
        cuda.synchronize()?;
        Ok(state)
    }

    fn make(&self, words: usize, allocate: impl Fn(&Cuda, *mut u64, usize) -> Result<()>) -> Result<Buffer> {
        let mut address = 0;
        allocate(self.cuda, &mut address, words * 4)?;
        self.cuda.stream_synchronize(self.streams[0])?;
        self.cuda.memset(address, 0, words)?;
        Ok(Buffer { address, words, line: Line::default() })
    }

    fn plain(&mut self, words: usize) -> Result<()> {
        let buffer = self.make(words, |cuda, at, len| cuda.alloc(at, len))?;
        self.buffers.push(buffer);
        Ok(())
    }

    fn virtual_memory(&mut self, device: i32, size: u64) -> Result<()> {
        let prop = Prop {
            kind: 1,
            handle_types: 0,
            location_kind: 1,
            location: device,
            win32: ptr::null_mut(),
            flags: 0,
        };
        let (mut address, half) = (0, (size / 2) as usize);
        self.cuda.reserve(&mut address, size as usize, 0, 0, 0)?;
        for i in 0..2 {
            let mut handle = 0;
            self.cuda.create(&mut handle, half, &prop, 0)?;
            self.cuda.map(address + (i * half) as u64, half, 0, handle, 0)?;
        }
        let access = Access { location_kind: 1, location: device, flags: 3 };
        self.cuda.set_access(address, size as usize, &access, 1)?;
        let words = (size / 4) as usize;
        self.cuda.memset(address, 0, words)?;
        self.buffers.push(Buffer { address, words, line: Line::default() });
        Ok(())
    }

    fn launch(&self, function: Handle, words: u64, stream: Handle, args: &mut [*mut c_void]) -> Result<()> {
        let blocks = (words.div_ceil(256) as u32).clamp(1, 1024);
        self.cuda.launch(function, blocks, 1, 1, 256, 1, 1, 0, stream, args.as_mut_ptr(), ptr::null_mut())
    }

    /// The small allocations that a step changes.
    fn window(&self, step: u64) -> impl Iterator<Item = usize> + use<> {
        let (count, first) = (self.small.len(), step as usize * WINDOW);
        (0..count.min(WINDOW)).map(move |i| (first + i) % count)
    }

    /// Computes one step, on both streams.
    pub fn advance(&mut self, step: u64) -> Result<()> {
        let window = self.window(step).map(|i| &self.small[i]);
        for (i, buffer) in self.buffers.iter().chain(window).enumerate() {
            let (mut address, mut words, mut salt) = (buffer.address, buffer.words as u64, salt(step, i));
            let args = &mut [(&raw mut address).cast(), (&raw mut words).cast(), (&raw mut salt).cast()];
            self.launch(self.advance, words, self.streams[i % 2], args)?;
        }
        // The sum is taken on the other stream, behind an event.
        self.cuda.event_record(self.event, self.streams[0])?;
        self.cuda.stream_wait(self.streams[1], self.event, 0)?;
        let (mut to, mut from, mut words) =
            (self.sum.address, self.buffers[0].address, self.sum.words as u64);
        let args = &mut [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut words).cast()];
        self.launch(self.combine, words, self.streams[1], args)?;
        self.cuda.launch(
            self.count,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            self.streams[1],
            ptr::null_mut(),
            ptr::null_mut(),
        )?;
        for stream in self.streams {
            self.cuda.stream_synchronize(stream)?;
        }
        for (i, buffer) in self.buffers.iter_mut().enumerate() {
            buffer.line.advance(salt(step, i));
        }
        let large = self.buffers.len();
        for (i, index) in self.window(step).enumerate() {
            self.small[index].line.advance(salt(step, large + i));
        }
        self.sum.line.combine(self.buffers[0].line);
        self.steps += 1;
        Ok(())
    }

    /// One of the streams.
    pub fn stream(&self) -> Handle {
        self.streams[0]
    }

    /// Launches a kernel of one thread `count` times and waits.
    pub fn launch_empty(&self, count: usize) -> Result<()> {
        for _ in 0..count {
            self.launch(self.count, 1, self.streams[0], &mut [])?;
        }
        self.cuda.stream_synchronize(self.streams[0])
    }

    /// Reads everything back; returns a digest of it and whether it is right to the last bit.
    pub fn verify(&self) -> Result<(u64, bool)> {
        let mut digest = 0xcbf2_9ce4_8422_2325u64;
        let mut ok = true;
        let mut words = Vec::new();
        for buffer in self.buffers.iter().chain([&self.sum]).chain(&self.small) {
            words.resize(buffer.words, 0u32);
            self.cuda.copy_out(words.as_mut_ptr().cast(), buffer.address, buffer.words * 4)?;
            for (i, word) in words.iter().enumerate() {
                ok &= *word == buffer.line.at(i);
                digest = (digest ^ u64::from(*word)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        let mut generation = 0u32;
        self.cuda.copy_out((&raw mut generation).cast(), self.generation, 4)?;
        Ok((digest ^ u64::from(generation), ok && generation == self.steps))
    }

    /// Keeps the GPU busy with one kernel as long as `wanted` says.
    pub fn hang(&mut self, wanted: impl Fn() -> bool) -> Result<()> {
        // SAFETY: page-locked memory that lives as long as the program.
        let flag = unsafe { &*self.flag };
        flag.store(0, Ordering::SeqCst);
        let mut address = self.flag as u64;
        self.cuda.launch(
            self.spin,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            self.streams[0],
            &mut (&raw mut address).cast(),
            ptr::null_mut(),
        )?;
        while wanted() {
            thread::sleep(Duration::from_millis(5));
        }
        flag.store(1, Ordering::SeqCst);
        self.cuda.stream_synchronize(self.streams[0])
    }
}

/// Makes every buffer's step different from the others'.
fn salt(step: u64, buffer: usize) -> u32 {
    (step as u32).wrapping_mul(31).wrapping_add(buffer as u32)
}
