//! What a process shares with others: CUDA IPC between processes of one container, memory by file descriptor, and what stays
//! the driver's and prevents a checkpoint.

#![allow(clippy::unwrap_used, reason = "the tests' steps are functions of their own")]

use std::env;
use std::ffi::c_void;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use phos_integration::application::{Application, Code, SHARED_CONTROL, out};
use phos_protocol::message::CLASS_IMPORTED;

const MIB: usize = 1 << 20;
const INVALID_VALUE: u32 = 1;
const INVALID_CONTEXT: u32 = 201;
const INVALID_HANDLE: u32 = 400;

#[repr(C)]
#[derive(Clone, Copy)]
struct Handle([u8; 64]);

/// `cuIpcOpenMemHandle`, which takes its handle by value.
fn open(app: &Application, handle: Handle, flags: u32) -> Result<u64, Code> {
    type Open = unsafe extern "C" fn(usize, Handle, u32) -> Code;
    let mut address = 0u64;
    // SAFETY: the function's type in cuda.h.
    let code = unsafe {
        let open = std::mem::transmute::<usize, Open>(app.symbol("cuIpcOpenMemHandle_v2"));
        open(out(&mut address), handle, flags)
    };
    if code == 0 { Ok(address) } else { Err(code) }
}

fn open_event(app: &Application, handle: Handle) -> Result<usize, Code> {
    type Open = unsafe extern "C" fn(usize, Handle) -> Code;
    let mut event = 0usize;
    // SAFETY: the function's type in cuda.h.
    let code = unsafe {
        let open = std::mem::transmute::<usize, Open>(app.symbol("cuIpcOpenEventHandle"));
        open(out(&mut event), handle)
    };
    if code == 0 { Ok(event) } else { Err(code) }
}

fn handle_of(app: &Application, address: u64) -> Handle {
    let mut handle = Handle([0; 64]);
    app.ok("cuIpcGetMemHandle", &[out(&mut handle), address as usize]);
    handle
}

fn blockers(app: &Application) -> Vec<String> {
    app.library().unwrap().query().unwrap().blockers
}

/// Another process under the library, which does as it is told.
struct Partner {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Partner {
    fn start(app: &Application) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "partner", "--nocapture"]).env(SHARED_CONTROL, app.control_folder());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Partner { child, to, from }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn say(&mut self, command: &str) {
        writeln!(self.to, "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> Result<u64, Code> {
        self.say(command);
        self.answer()
    }

    /// A code of CUDA or a value.
    fn answer(&mut self) -> Result<u64, Code> {
        for line in self.from.by_ref().lines() {
            let line = line.unwrap();
            if let Some(value) = line.strip_prefix("value ") {
                return Ok(value.parse().unwrap());
            }
            if let Some(code) = line.strip_prefix("code ") {
                return Err(code.parse().unwrap());
            }
        }
        panic!("the partner has ended");
    }

    fn open(&mut self, handle: Handle) -> Result<u64, Code> {
        self.ask(&format!("open {}", hex(&handle)))
    }

    fn end(mut self) {
        drop(self.to);
        assert!(self.child.wait().unwrap().success());
    }
}

fn hex(handle: &Handle) -> String {
    handle.0.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Handle {
    Handle(std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()))
}

/// Memory of the program's own virtual-memory calls, mapped.
fn map(app: &Application, handle: u64, size: usize) -> u64 {
    let mut address = 0u64;
    app.ok("cuMemAddressReserve", &[out(&mut address), size, 0, 0, 0]);
    app.ok("cuMemMap", &[address as usize, size, 0, handle as usize, 0]);
    // CUmemAccessDesc: device 0, read and write.
    let access = [1u32, 0, 3];
    app.ok("cuMemSetAccess", &[address as usize, size, access.as_ptr() as usize, 1]);
    address
}

/// Not a test by itself: the other process of the tests below.
#[test]
fn partner() {
    if env::var_os(SHARED_CONTROL).is_none() {
        return;
    }
    let app = Application::start().unwrap();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| words[n].parse::<u64>().unwrap();
        let status = |code| if code == 0 { Ok(0) } else { Err(code) };
        let answer = match words[0] {
            "open" => open(&app, unhex(words[1]), 1),
            "event" => open_event(&app, unhex(words[1])).map(|e| e as u64),
            "query" => status(app.call("cuEventQuery", &[number(1) as usize])),
            "device" => {
                app.use_device(number(1) as usize);
                Ok(0)
            }
            "close" => status(app.call("cuIpcCloseMemHandle", &[number(1) as usize])),
            "read" => {
                let mut word = 0u32;
                let code = app.call("cuMemcpyDtoH_v2", &[out(&mut word), number(1) as usize, 4]);
                status(code).map(|_| u64::from(word))
            }
            "fill" => {
                app.fill(number(1), number(2) as u32, 100);
                Ok(0)
            }
            "share" => {
                let address = app.alloc(3 * MIB);
                app.fill(address, number(1) as u32, 100);
                println!("handle {}", hex(&handle_of(&app, address)));
                Ok(address)
            }
            "import" => {
                // As PyTorch does: the number of a descriptor of the other process.
                // SAFETY: plain system calls.
                let fd = unsafe {
                    let process = libc::syscall(libc::SYS_pidfd_open, number(1) as i32, 0);
                    libc::syscall(libc::SYS_pidfd_getfd, process, number(2) as i32, 0)
                };
                let mut handle = 0u64;
                app.ok("cuMemImportFromShareableHandle", &[out(&mut handle), fd as usize, 1]);
                Ok(map(&app, handle, 4 * MIB))
            }
            other => panic!("{other}?"),
        };
        match answer {
            Ok(value) => println!("value {value}"),
            Err(code) => println!("code {code}"),
        }
    }
}

fn handles_of_the_drivers_own() {
    let app = Application::start().unwrap();
    assert!(blockers(&app).is_empty());
    assert_eq!(open(&app, Handle([8; 64]), 1), Err(INVALID_VALUE), "the driver's own answer");
    assert!(blockers(&app).is_empty());
    assert!(open(&app, Handle([7; 64]), 1).is_ok(), "the handle arrives as it was passed");
    assert!(blockers(&app)[0].contains("CUDA IPC"), "{:?}", blockers(&app));
    let error = format!("{:#}", app.round_trip().err().unwrap());
    assert!(error.contains("CUDA IPC"), "{error}");
    // Refused, not harmed.
    let address = app.alloc(1000);
    app.free(address);
}

/// Parks both processes and gives both their memory back.
fn both_away(app: &Application, partner: &Partner) -> u64 {
    let (theirs, taken) = app.park_of(partner.pid()).unwrap();
    taken.unwrap();
    let (ours, taken) = app.park().unwrap();
    taken.unwrap();
    app.attach_of(partner.pid(), &theirs).unwrap();
    app.attach(&ours).unwrap();
    theirs.bytes(CLASS_IMPORTED)
}

fn memory_by_ipc() {
    let app = Application::start().unwrap();
    let mut partner = Partner::start(&app);
    let (large, first, small) = (app.alloc(3 * MIB), app.alloc(1000), app.alloc(1000));
    for (address, value) in [(large, 1), (first, 2), (small, 3)] {
        app.fill(address, value, 100);
    }
    // Its own is refused, as by the driver, and so are flags that the driver does not know.
    assert_eq!(open(&app, handle_of(&app, large), 1), Err(INVALID_CONTEXT));
    assert_eq!(open(&app, handle_of(&app, large), 0), Err(INVALID_VALUE));
    let mut pooled = 0u64;
    app.ok("cuMemAllocAsync", &[out(&mut pooled), MIB, 0]);
    let mut none = Handle([0; 64]);
    assert_eq!(app.call("cuIpcGetMemHandle", &[out(&mut none), pooled as usize]), INVALID_VALUE);
    // What the program is told beforehand agrees with that.
    for (address, capable) in [(large, 1), (small + 10, 1), (pooled, 0)] {
        let (mut alone, mut among, which) = (7u8, 7u8, [10u32]);
        app.ok("cuPointerGetAttribute", &[out(&mut alone), 10, address as usize]);
        app.ok(
            "cuPointerGetAttributes",
            &[1, which.as_ptr() as usize, out(&mut [&raw mut among]), address as usize],
        );
        assert_eq!((alone, among), (capable, capable));
    }
    app.ok("cuMemFreeAsync", &[pooled as usize, 0]);

    // Any address of an allocation names all of it; small ones keep their places.
    let theirs = partner.open(handle_of(&app, large + 100)).unwrap();
    let (one, two) =
        (partner.open(handle_of(&app, first)).unwrap(), partner.open(handle_of(&app, small)).unwrap());
    assert_eq!(two - one, small - first);
    assert_eq!([theirs, one, two].map(|a| partner.ask(&format!("read {a}")).unwrap()), [1, 2, 3]);
    // Opened again it is the same, and stays until it is closed as often.
    assert_eq!(partner.open(handle_of(&app, large)), Ok(theirs));
    partner.ask(&format!("close {theirs}")).unwrap();
    partner.ask(&format!("fill {theirs} 11")).unwrap();
    assert_eq!(app.read(large, 100), [11; 100]);

    // Opened from another device it is the same, and both may use it.
    partner.ask("device 1").unwrap();
    assert_eq!(partner.open(handle_of(&app, large)), Ok(theirs));
    assert_eq!(partner.ask(&format!("read {theirs}")), Ok(11));
    partner.ask(&format!("close {theirs}")).unwrap();
    let apart = app.alloc(200 * MIB);
    app.fill(apart, 12, 100);
    let far = partner.open(handle_of(&app, apart)).unwrap();
    assert_eq!(partner.ask(&format!("read {far}")), Ok(12));
    partner.ask("device 0").unwrap();
    assert_eq!(partner.ask(&format!("read {far}")), Ok(12));
    partner.ask(&format!("close {far}")).unwrap();
    app.free(apart);

    // Parked and attached it is still one memory, in both directions, and more can be opened.
    assert!(
        blockers(&app).is_empty()
            && app.library_of(partner.pid()).unwrap().query().unwrap().blockers.is_empty()
    );
    for round in 0..2 {
        assert!(both_away(&app, &partner) >= 5 * MIB as u64);
        app.fill(large, 21 + round, 100);
        assert_eq!(partner.ask(&format!("read {theirs}")), Ok(u64::from(21 + round)));
        partner.ask(&format!("fill {two} {}", 31 + round)).unwrap();
        assert_eq!(app.read(small, 100), [31 + round; 100]);
        let another = app.alloc(5 * MIB);
        let there = partner.open(handle_of(&app, another)).unwrap();
        partner.ask(&format!("close {there}")).unwrap();
        app.free(another);
    }

    // Who asks a process that is parked gets its answer when that one is back.
    let late = app.alloc(5 * MIB);
    app.fill(late, 55, 100);
    let handle = handle_of(&app, late);
    let (ours, taken) = app.park().unwrap();
    taken.unwrap();
    partner.say(&format!("open {}", hex(&handle)));
    thread::sleep(Duration::from_millis(50));
    app.attach(&ours).unwrap();
    let there = partner.answer().unwrap();
    assert_eq!(partner.ask(&format!("read {there}")), Ok(55));
    partner.ask(&format!("close {there}")).unwrap();
    app.free(late);

    // Memory that runs out moves nothing that is shared.
    let mut held = Vec::new();
    let mut piece = 0u64;
    while app.call("cuMemAlloc_v2", &[out(&mut piece), 64 * MIB]) == 0 {
        held.push(piece);
    }
    held.into_iter().for_each(|a| app.free(a));
    app.fill(large, 24, 100);
    assert_eq!(partner.ask(&format!("read {theirs}")), Ok(24));

    // Freed here first, it lives there until it is closed; nobody can open it any more.
    let handle = handle_of(&app, large);
    app.free(large);
    assert_eq!(partner.ask(&format!("read {theirs}")), Ok(24));
    both_away(&app, &partner);
    assert_eq!(partner.ask(&format!("read {theirs}")), Ok(24));
    partner.ask(&format!("close {theirs}")).unwrap();
    assert!(partner.ask(&format!("close {theirs}")).is_err());
    assert_eq!(partner.open(handle), Err(INVALID_HANDLE));

    // The other way round; the one that made it ends first.
    writeln!(partner.to, "share 77").unwrap();
    let mut line = String::new();
    while !line.contains("handle ") {
        line.clear();
        partner.from.read_line(&mut line).unwrap();
    }
    let handle = unhex(line.trim().split("handle ").nth(1).unwrap());
    let mine = open(&app, handle, 1).unwrap();
    partner.end();
    assert_eq!(app.read(mine, 100), [77; 100]);
    app.round_trip().unwrap();
    assert_eq!(app.read(mine, 100), [77; 100]);
    app.ok("cuIpcCloseMemHandle", &[mine as usize]);
    let begin = Instant::now();
    assert_eq!(open(&app, handle, 1), Err(INVALID_HANDLE), "its process has ended");
    assert!(begin.elapsed() < Duration::from_secs(5));
    app.free(first);
    app.free(small);
}

fn memory_by_descriptor() {
    let app = Application::start().unwrap();
    let mut partner = Partner::start(&app);
    // CUmemAllocationProp: pinned, by descriptor, on device 0.
    let props: [u32; 8] = [1, 1, 1, 0, 0, 0, 0, 0];
    let (mut handle, mut fd) = (0u64, -1i32);
    app.ok("cuMemCreate", &[out(&mut handle), 4 * MIB, props.as_ptr() as usize, 0]);
    let address = map(&app, handle, 4 * MIB);
    app.fill(address, 5, 100);
    app.ok("cuMemExportToShareableHandle", &[out(&mut fd), handle as usize, 1, 0]);
    let theirs = partner.ask(&format!("import {} {fd}", std::process::id())).unwrap();
    // SAFETY: the descriptor is this test's.
    unsafe { libc::close(fd) };
    assert_eq!(partner.ask(&format!("read {theirs}")), Ok(5));
    assert_eq!(both_away(&app, &partner), 4 * MIB as u64);
    partner.ask(&format!("fill {theirs} 6")).unwrap();
    assert_eq!(app.read(address, 100), [6; 100]);
    partner.end();
    app.ok("cuMemUnmap", &[address as usize, 4 * MIB]);
    app.ok("cuMemRelease", &[handle as usize]);
}

fn events() {
    unsafe extern "C" fn wait(flag: *mut c_void) {
        // SAFETY: the flag lives until the stream has been waited for.
        while !unsafe { &*flag.cast::<AtomicBool>() }.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let app = Application::start().unwrap();
    let mut partner = Partner::start(&app);
    let (mut stream, mut event, mut handle) = (0usize, 0usize, Handle([0; 64]));
    app.ok("cuStreamCreate", &[out(&mut stream), 1]);
    // CU_EVENT_DISABLE_TIMING and CU_EVENT_INTERPROCESS.
    app.ok("cuEventCreate", &[out(&mut event), 6]);
    app.ok("cuIpcGetEventHandle", &[out(&mut handle), event]);
    assert_eq!(open_event(&app, handle), Err(INVALID_CONTEXT));
    let theirs = partner.ask(&format!("event {}", hex(&handle))).unwrap();
    // What is recorded is done by the time that anybody else can know of it.
    let flag = AtomicBool::new(false);
    let mark = || app.ok("cuLaunchHostFunc", &[stream, wait as *const () as usize, flag.as_ptr() as usize]);
    thread::scope(|scope| {
        mark();
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            flag.store(true, Ordering::SeqCst);
        });
        app.ok("cuEventRecord", &[event, stream]);
        assert!(flag.load(Ordering::SeqCst), "recording a shared event waits");
    });
    assert_eq!(partner.ask(&format!("query {theirs}")), Ok(0));
    assert!(blockers(&app).is_empty());
    both_away(&app, &partner);
    partner.end();
    // One that is not shared is as it was.
    let mut own = 0usize;
    app.ok("cuEventCreate", &[out(&mut own), 6]);
    flag.store(false, Ordering::SeqCst);
    mark();
    app.ok("cuEventRecord", &[own, stream]);
    assert_ne!(app.call("cuEventQuery", &[own]), 0, "still under way");
    flag.store(true, Ordering::SeqCst);
    app.ok("cuStreamSynchronize", &[stream]);
    app.ok("cuEventDestroy_v2", &[own]);
    app.ok("cuEventDestroy_v2", &[event]);
}

/// The counters of the driver's own sharing are never lowered, so what must find none comes first.
#[test]
fn processes_of_a_container_share_and_are_checkpointed() {
    memory_by_ipc();
    memory_by_descriptor();
    events();
    handles_of_the_drivers_own();
}
