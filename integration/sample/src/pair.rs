//! Two processes that share GPU memory: one by CUDA IPC, one by file descriptor. Each changes its half of both and verifies
//! the whole, so memory that came back as two instead of one shows at the next step.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use phos_protocol::Connection;

use crate::cuda::{Access, Cuda, Handle, IpcHandle, Prop};
use crate::model::Line;
use crate::state::PTX;

/// Bytes of each of the two pieces.
const SIZE: usize = 4 << 20;
/// Words of a half.
const HALF: usize = SIZE / 8;

/// One process's view of the two pieces.
pub struct Pair<'a> {
    cuda: &'a Cuda,
    advance: Handle,
    /// Both, as they are mapped here.
    pieces: [u64; 2],
    /// What both halves must look like.
    halves: [Line; 2],
    /// The half that this process changes.
    own: usize,
    other: Connection,
}

fn context(cuda: &Cuda) -> Result<(Handle, i32)> {
    let mut device = 0;
    cuda.device_get(&mut device, 0)?;
    let mut context = ptr::null_mut();
    cuda.primary_retain(&mut context, device)?;
    cuda.set_current(context)?;
    let image = std::ffi::CString::new(PTX)?;
    let (mut module, mut advance) = (ptr::null_mut(), ptr::null_mut());
    cuda.module_load(&mut module, image.as_ptr().cast())?;
    cuda.function(&mut advance, module, c"advance".as_ptr())?;
    Ok((advance, device))
}

fn map(cuda: &Cuda, handle: u64, device: i32) -> Result<u64> {
    let mut address = 0;
    cuda.reserve(&mut address, SIZE, 0, 0, 0)?;
    cuda.map(address, SIZE, 0, handle, 0)?;
    let access = Access { location_kind: 1, location: device, flags: 3 };
    cuda.set_access(address, SIZE, &access, 1)?;
    Ok(address)
}

/// A socket pair: one end, and the other for a child's standard input.
fn sockets() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two; they are owned by what is returned.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        ensure!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) == 0, "no socket pair");
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

impl<'a> Pair<'a> {
    /// Makes the memory and starts the other process.
    pub fn start(cuda: &'a Cuda) -> Result<Self> {
        let (advance, device) = context(cuda)?;
        let prop = Prop {
            kind: 1,
            // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            handle_types: 1,
            location_kind: 1,
            location: device,
            win32: ptr::null_mut(),
            flags: 0,
        };
        let (mut plain, mut handle, mut fd) = (0, 0, -1);
        cuda.alloc(&mut plain, SIZE)?;
        cuda.create(&mut handle, SIZE, &prop, 0)?;
        let own = map(cuda, handle, device)?;
        for address in [plain, own] {
            cuda.memset(address, 0, SIZE / 4)?;
        }
        let mut name = IpcHandle([0; 64]);
        cuda.ipc_get(&mut name, plain)?;
        cuda.export((&raw mut fd).cast(), handle, 1, 0)?;
        // SAFETY: the driver has just opened this descriptor for the caller.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let (mine, theirs) = sockets()?;
        let program = std::env::current_exe().context("own path")?;
        // Ends by itself when its socket closes.
        Command::new(program).arg("--partner").stdin(Stdio::from(theirs)).spawn().context("the partner")?;
        let other = Connection::new(mine);
        other.send_bytes(&name.0, &[fd.as_raw_fd()])?;
        Ok(Pair { cuda, advance, pieces: [plain, own], halves: Default::default(), own: 0, other })
    }

    /// The other process: takes the memory in, and then one step for each that it is told to, until the first one has ended.
    pub fn partner(cuda: &'a Cuda) -> Result<()> {
        let (advance, device) = context(cuda)?;
        let other = Connection::new(std::io::stdin().as_fd().try_clone_to_owned()?);
        let (name, fds) = other.receive_bytes()?;
        let name = IpcHandle(name.try_into().ok().context("not a handle")?);
        let [fd] = <[OwnedFd; 1]>::try_from(fds).ok().context("no descriptor")?;
        let (mut plain, mut handle) = (0, 0);
        cuda.ipc_open(&mut plain, name, 1)?;
        cuda.import(&mut handle, fd.as_raw_fd() as usize as *mut c_void, 1)?;
        let pieces = [plain, map(cuda, handle, device)?];
        let mut pair = Pair { cuda, advance, pieces, halves: Default::default(), own: 1, other };
        while let Ok((step, _)) = pair.other.receive_bytes() {
            let step = u64::from_le_bytes(step.try_into().ok().context("not a step")?);
            // The first process has taken this step already.
            pair.halves[0].advance(step as u32);
            pair.change(step)?;
            let (digest, ok) = pair.verify()?;
            pair.other.send_bytes(&[digest.to_le_bytes().as_slice(), &[u8::from(ok)]].concat(), &[])?;
        }
        Ok(())
    }

    /// Takes a step in the own half of both pieces.
    fn change(&mut self, step: u64) -> Result<()> {
        for address in self.pieces {
            let mut address = address + (self.own * HALF * 4) as u64;
            let (mut words, mut salt) = (HALF as u64, step as u32);
            let mut args =
                [(&raw mut address).cast::<c_void>(), (&raw mut words).cast(), (&raw mut salt).cast()];
            let blocks = HALF.div_ceil(256).min(1024) as u32;
            let stream = ptr::null_mut();
            self.cuda.launch(
                self.advance,
                blocks,
                1,
                1,
                256,
                1,
                1,
                0,
                stream,
                args.as_mut_ptr(),
                ptr::null_mut(),
            )?;
        }
        self.cuda.synchronize()?;
        self.halves[self.own].advance(step as u32);
        Ok(())
    }

    /// One step of both processes; both must find the same, and both the right thing.
    pub fn step(&mut self, step: u64) -> Result<(u64, bool)> {
        self.change(step)?;
        self.other.send_bytes(&step.to_le_bytes(), &[])?;
        let (answer, _) = self.other.receive_bytes().context("the partner has ended")?;
        self.halves[1].advance(step as u32);
        let (digest, ok) = self.verify()?;
        let (theirs, rest) = answer.split_first_chunk::<8>().context("no answer")?;
        if *rest != [1] || u64::from_le_bytes(*theirs) != digest {
            bail!("step {step}: the two processes do not see the same");
        }
        Ok((digest, ok))
    }

    fn verify(&self) -> Result<(u64, bool)> {
        let (mut digest, mut ok) = (0xcbf2_9ce4_8422_2325u64, true);
        let mut words = vec![0u32; 2 * HALF];
        for address in self.pieces {
            self.cuda.copy_out(words.as_mut_ptr().cast(), address, SIZE)?;
            for (half, line) in words.chunks(HALF).zip(&self.halves) {
                ok &= half.iter().enumerate().all(|(i, word)| *word == line.at(i));
            }
            digest = words.iter().fold(digest, |d, w| (d ^ u64::from(*w)).wrapping_mul(0x0100_0000_01b3));
        }
        Ok((digest, ok))
    }
}
