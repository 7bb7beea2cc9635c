//! Runs one fault after the other on one container, for as long as it lives.

mod stuck;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phos_engine::image::Image;

use super::leaks::{Inventory, others, wait_until_quiet};
use super::wrappers::{self, When, With};
use super::{Action, Case, Outcome, Place, Row, Way, driver};
use crate::bundle::Gpu;
use crate::container::{Container, Ended, Place as Folder};
use crate::status;

/// How long a job and all that puts it right may take.
const LIMIT: Duration = Duration::from_secs(90);
/// How long the program may take for its next steps once all is quiet.
const STEPS: Duration = Duration::from_secs(20);

/// How long a descriptor or a thread that is about to go may take.
const SETTLING: Duration = Duration::from_secs(3);

/// Limits short enough that a call that hangs costs seconds. Only jobs that faults are made in have them: what else is done on a
/// busy machine may take longer.
const CONFIG: &str = "drain_timeout = 3\nlock_timeout = 3\ndriver_timeout = 3\nattach_timeout = 6\nstall_timeout = 3\ncriu_timeout = 20\n";
/// The same for a GPU, whose driver takes its time.
const REAL_CONFIG: &str = "drain_timeout = 10\nlock_timeout = 10\ndriver_timeout = 20\nattach_timeout = 20\nstall_timeout = 20\ncriu_timeout = 60\n";

/// Takes the foreground with it when it is killed.
const SHIM: &str = "setpriv --pdeathsig KILL -- \"$0\" \"$@\"; true";

/// A fault that was made.
#[derive(Debug)]
pub struct Struck {
    case: Case,
    /// The program that it was made on, 0 if that is yet to be restored.
    pid: i32,
    ended: Ended,
    /// Whether something was done from outside.
    done: bool,
}

/// A place with one container, on which faults are made.
pub struct Bench<'a> {
    folder: &'a Folder,
    container: Option<Container<'a>>,
    before: Inventory,
    /// Restores every image that is complete, also of a program that runs on.
    pub restore_all: bool,
}

impl<'a> Bench<'a> {
    /// Prepares a place.
    pub fn new(folder: &'a Folder) -> Result<Self> {
        let config = if folder.gpu == Gpu::Simulated { CONFIG } else { REAL_CONFIG };
        fs::write(folder.path("hasty.toml"), config)?;
        wrappers::install(folder)?;
        Ok(Bench { folder, container: None, before: Inventory::default(), restore_all: false })
    }

    /// The container.
    pub fn container(&self) -> Result<&Container<'a>> {
        self.container.as_ref().context("no container")
    }

    /// Has a container that runs, if the last one is gone.
    pub fn ready(&mut self) -> Result<()> {
        if self.container.is_none() {
            let container = self.folder.sample(&["--mib", "24", "--step-ms", "2"])?;
            container.start()?;
            container.steps(3)?;
            self.container = Some(container);
            // What every checkpoint leaves in a program (a thread's memory, a region made beforehand) is no leak of a fault.
            self.container()?.checkpoint("warm", true)?;
            self.image_removed("warm")?;
            wait_until_quiet(LIMIT);
            self.container()?.steps(2)?;
            self.count()?;
        }
        Ok(())
    }

    /// What is there now is no leak of what comes.
    pub fn count(&mut self) -> Result<()> {
        let taken = Inventory::take(self.folder, self.container()?);
        self.before = taken.context("the container does not run")?;
        Ok(())
    }

    fn image_removed(&self, name: &str) -> Result<()> {
        let image = self.container()?.image(name);
        let _ = fs::remove_dir_all(&image);
        for suffix in [".phos-earlier", ".phos-moving"] {
            let mut path = image.clone().into_os_string();
            path.push(suffix);
            let _ = fs::remove_dir_all(path);
        }
        Ok(())
    }

    /// Replaces the simulated driver's rules in the program. A GPU's own driver has none.
    fn arm(&self, pid: i32, rules: &str) -> Result<()> {
        if self.folder.gpu == Gpu::Simulated { driver::arm(pid, rules) } else { Ok(()) }
    }

    fn faults(&self) -> PathBuf {
        self.folder.path("fault")
    }

    /// What the environment must have for a case.
    fn overlay(&self, case: &Case) -> Vec<(&'static str, OsString)> {
        let mut rules = Vec::new();
        let mut calls = Vec::new();
        let mut variables = vec![("PHOS_FAULT_DIR", self.faults().into_os_string())];
        let with = match case.action {
            Action::KillForeground => With::Foreground,
            Action::KillAll => With::All,
            _ => With::Nobody,
        };
        match &case.place {
            Place::Point(name, arrival) => rules.push(format!("{name}@{arrival}={}", case.action.rule())),
            Place::Worker(call, code, always) => {
                calls.push(format!("{call}:{}:{code}", if *always { "*" } else { "1" }));
            }
            Place::Lower(ms) => variables.extend(wrappers::kill_lower(self.folder, *ms)),
            Place::Criu(ms) => variables.extend(wrappers::kill_criu(self.folder, When::After(*ms), with)),
            Place::CriuAt(action) => {
                variables.extend(wrappers::kill_criu(self.folder, When::At(action), with));
            }
            Place::Nowhere | Place::Time(_) | Place::Program(..) => {}
        }
        if case.place != Place::Nowhere {
            variables.push(("PHOS_CONFIG", self.folder.path("hasty.toml").into()));
        }
        match case.way {
            Way::Precopy => variables.push(("PHOS_STRATEGY", "precopy".into())),
            Way::Recovery => rules.push("phase.detaching=kill".into()),
            Way::Lost => {
                rules.push("at.dump-told=kill".into());
                calls.push("cuCheckpointProcessRestore:*:999".into());
            }
            _ => {}
        }
        variables.push(("PHOS_FAULT", rules.join(",").into()));
        variables.push(("SIMCUDA_FAIL", calls.join(",").into()));
        variables.push(("SIMCUDA_CALLS", self.faults().join("calls").into()));
        variables
    }

    /// Functions of the driver that the program calls by itself.
    pub fn programs_calls(&mut self) -> Result<Vec<String>> {
        self.ready()?;
        let pid = self.container()?.pid()?;
        self.arm(pid, "")?;
        self.container()?.steps(10)?;
        if self.folder.gpu == Gpu::Simulated { driver::called(pid) } else { Ok(Vec::new()) }
    }

    /// Makes a fault and says what came of it. An error is one of the bench itself.
    pub fn run(&mut self, case: &Case) -> Result<Row> {
        self.ready()?;
        let struck = self.strike(case)?;
        self.settle(struck)
    }

    /// Makes a fault. Other benches may do the same meanwhile.
    pub fn strike(&mut self, case: &Case) -> Result<Struck> {
        let _ = fs::remove_dir_all(self.faults());
        fs::create_dir_all(self.faults())?;
        self.image_removed("image")?;
        match case.way {
            Way::Again | Way::Recovery => {
                self.container()?.checkpoint("image", true)?;
                self.quiet();
                if case.way == Way::Again {
                    self.container()?.verb("pause", &[])?;
                }
            }
            Way::Restore => {
                self.container()?.checkpoint("image", false)?;
                self.container()?.verb("delete", &["--force"])?;
            }
            _ => {}
        }
        let pid = match case.way {
            Way::Restore => 0,
            _ => self.container()?.pid()?,
        };
        if let Place::Program(call, code, always) = &case.place {
            self.arm(pid, &format!("{call}:{}:{code}", if *always { "*" } else { "1" }))?;
        } else if pid > 0 {
            self.arm(pid, "")?;
        }
        self.folder.overlay(self.overlay(case));
        let outside = case.action.is_outside() && matches!(case.place, Place::Point(..) | Place::Time(_));
        let ended = if outside { self.meddle(case) } else { self.command(case, None).map(|e| (e, false)) };
        // What is done from outside may still wait to be let go.
        fs::write(self.faults().join("go"), "")?;
        self.folder.overlay([]);
        let (ended, done) = ended?;
        Ok(Struck { case: case.clone(), pid, ended, done })
    }

    /// Says what came of a fault, once nobody is at work any more.
    pub fn settle(&mut self, struck: Struck) -> Result<Row> {
        if let Some(row) = self.stuck(&struck)? {
            return Ok(row);
        }
        let Struck { ref case, pid, ref ended, done } = struck;
        let mut leaked: Vec<String> =
            wait_until_quiet(LIMIT).into_iter().map(|p| format!("process {p}")).collect();
        if !leaked.is_empty() {
            for (pid, _) in others() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let lines = |name: &str| -> Vec<String> {
            let text = fs::read_to_string(self.faults().join(name)).unwrap_or_default();
            text.lines().map(Into::into).collect()
        };
        let (worker_calls, reached) = (lines("calls"), lines("reached"));
        // A program that has ended has no driver.
        let program_calls = driver::called(pid).unwrap_or_default();
        let _ = self.arm(pid, "");
        let struck = match &case.place {
            Place::Point(..) | Place::Criu(_) | Place::CriuAt(_) => self.faults().join("struck0").exists(),
            Place::Worker(call, ..) => worker_calls.contains(call),
            Place::Program(call, ..) => program_calls.contains(call) || program_calls.is_empty(),
            Place::Time(_) => done,
            _ => true,
        };
        let logged = self.container()?.last_error().unwrap_or_default();
        let silent = matches!(case.place, Place::Criu(_) | Place::CriuAt(_))
            && case.way == Way::Restore
            && case.action == Action::Kill
            && ended.status != 0
            && (logged.is_empty() || logged.contains('\n'));
        let outcome = match self.judge(case, ended, &mut leaked) {
            Ok(_) if silent => Outcome::Lost(format!("why is not said in one line: {logged:?}")),
            Ok(outcome) => outcome,
            Err(e) => Outcome::Lost(format!("{e:#}").replace('\n', " ")),
        };
        let for_ever = stuck::never_returns(&case.place);
        if for_ever {
            leaked.retain(|l| l != stuck::THREAD);
        }
        if matches!(outcome, Outcome::Lost(_) | Outcome::Gone) || !leaked.is_empty() || for_ever {
            // The next fault gets a new one.
            self.container = None;
        }
        let mut said = ended.text.trim().lines().last().unwrap_or_default().to_string();
        if case.way == Way::Restore && ended.status != 0 {
            // The container has its streams.
            said = logged;
        }
        Ok(Row { case: case.clone(), struck, outcome, leaked, said, reached, worker_calls, program_calls })
    }

    fn command(&self, case: &Case, shell: Option<&str>) -> Result<Ended> {
        let container = self.container()?;
        let flags = container.image_flags("image")?;
        let mut words: Vec<&str> = flags.iter().map(String::as_str).collect();
        let bundle = container.bundle.path.to_str().context("path")?;
        let verb = match case.way {
            Way::Restore => {
                words.extend(["--detach", "--bundle", bundle]);
                "restore"
            }
            Way::Stopping => "checkpoint",
            _ => {
                words.push("--leave-running");
                "checkpoint"
            }
        };
        container.try_verb_through(shell, verb, &words)
    }

    /// The processes at work in this place.
    fn own(&self) -> Vec<(i32, String)> {
        let folder = self.folder.path("").display().to_string();
        others().into_iter().filter(|(_, line)| line.contains(folder.trim_end_matches('/'))).collect()
    }

    /// Waits until none is.
    fn quiet(&self) {
        let deadline = Instant::now() + LIMIT;
        while !self.own().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Runs the command, and does something while one of its processes waits at a point or, whether they do or not, after a
    /// while. `true`: it was done.
    fn meddle(&self, case: &Case) -> Result<(Ended, bool)> {
        let shell = (case.action == Action::KillShim).then_some(SHIM);
        thread::scope(|scope| {
            let command = scope.spawn(|| self.command(case, shell));
            let begun = Instant::now();
            let arrived = || match case.place {
                Place::Time(ms) => begun.elapsed() >= Duration::from_millis(ms.into()),
                _ => self.faults().join("struck0").exists(),
            };
            while !arrived() && !command.is_finished() {
                ensure!(begun.elapsed() < LIMIT, "the point was not reached");
                thread::sleep(Duration::from_millis(1));
            }
            let done = if command.is_finished() { Ok(false) } else { self.act(case).map(|()| true) };
            if case.action != Action::Freeze {
                fs::write(self.faults().join("go"), "")?;
            }
            let ended = command.join().map_err(|_| anyhow::anyhow!("the command's thread panicked"))?;
            // Whom it was meant for may not have begun yet, or have ended.
            let done = if matches!(case.place, Place::Time(_)) { done.or(Ok(false)) } else { done };
            done.and_then(|done| Ok((ended?, done)))
        })
    }

    fn act(&self, case: &Case) -> Result<()> {
        let container = self.container()?;
        let with = |words: &[&str]| {
            self.own()
                .into_iter()
                .find(|(_, line)| words.iter().all(|w| line.contains(w)))
                .map(|(pid, _)| Pid::from_raw(pid))
        };
        match case.action {
            Action::KillForeground => {
                let pid = with(&["phos-runc", "--image-path", "--log-format"]).context("no foreground")?;
                kill(pid, Signal::SIGKILL)?;
            }
            Action::KillShim => kill(with(&["sh -c setpriv"]).context("no shim")?, Signal::SIGKILL)?,
            Action::KillKeeper => kill(with(&["__keeper"]).context("no keeper")?, Signal::SIGKILL)?,
            Action::KillWorker => kill(with(&["__worker"]).context("no worker")?, Signal::SIGKILL)?,
            Action::RemoveImage => fs::remove_dir_all(container.image("image"))?,
            Action::Freeze => {
                self.set_frozen(true)?;
                fs::write(self.faults().join("go"), "")?;
            }
            Action::KillProgram => kill(Pid::from_raw(container.pid()?), Signal::SIGKILL)?,
            Action::Delete => {
                // It waits for the job, which waits for `go`.
                thread::scope(|scope| {
                    let delete = scope.spawn(|| container.try_verb("delete", &["--force"]));
                    thread::sleep(Duration::from_millis(300));
                    fs::write(self.faults().join("go"), "")?;
                    delete.join().map_err(|_| anyhow::anyhow!("the delete's thread panicked"))??;
                    anyhow::Ok(())
                })?;
            }
            Action::Checkpoint => {
                let ended = container.try_checkpoint("second", true)?;
                ensure!(ended.status != 0 && ended.text.contains("under way"), "{ended:?}");
                ensure!(!container.image("second").exists(), "the second checkpoint left something behind");
            }
            Action::Exec => {
                // In a frozen container it waits for the thaw.
                let mark = container.bundle.out.join("exec");
                let _ = fs::remove_file(&mark);
                container.place.command(
                    Path::new("/bin/sh"),
                    &[
                        "-c",
                        "\"$0\" --root \"$1\" exec --detach \"$2\" /bin/sh -c ': >/out/exec' >/dev/null 2>&1 &",
                        container.runtime.to_str().context("path")?,
                        container.place.path("root").to_str().context("path")?,
                        &container.id,
                    ],
                    true,
                )?;
                thread::sleep(Duration::from_millis(100));
            }
            other => bail!("{other} is not done from outside"),
        }
        Ok(())
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let id = &self.container()?.id;
        let old = PathBuf::from("/sys/fs/cgroup/freezer").join(id).join("freezer.state");
        if old.exists() {
            return Ok(fs::write(old, if frozen { "FROZEN" } else { "THAWED" })?);
        }
        let new = PathBuf::from("/sys/fs/cgroup").join(id).join("cgroup.freeze");
        Ok(fs::write(new, if frozen { "1" } else { "0" })?)
    }

    /// Whether the folder of the image has something in it that is not a complete image.
    fn image(&self) -> Result<Option<Image>> {
        let path = self.container()?.image("image");
        for suffix in [".phos-earlier", ".phos-moving"] {
            let mut left = path.clone().into_os_string();
            left.push(suffix);
            ensure!(!PathBuf::from(&left).exists(), "{left:?} was left behind");
        }
        if fs::read_dir(&path).map_or(0, Iterator::count) == 0 {
            return Ok(None);
        }
        let image = Image::open_complete(&path).context("a partial image was left")?;
        image.verify().context("the image is not what it says")?;
        Ok(Some(image))
    }

    fn judge(&self, case: &Case, ended: &Ended, leaked: &mut Vec<String>) -> Result<Outcome> {
        let container = self.container()?;
        let undisturbed = case.place == Place::Nowhere && !matches!(case.way, Way::Recovery | Way::Lost);
        ensure!(!undisturbed || ended.status == 0, "nothing was in its way: {ended:?}\n{}", container.logs());
        let image = match self.image() {
            Ok(image) => image,
            Err(e) => {
                leaked.push(format!("{e:#}"));
                None
            }
        };
        if case.way != Way::Restore && ended.status == 0 && image.is_none() {
            let removed = matches!(case.action, Action::RemoveImage | Action::Delete);
            ensure!(removed, "success was reported, and there is no image");
        }
        let mut state = container.state()?;
        if state == "paused" {
            container.verb("resume", &[])?;
            state = container.state()?;
        }
        if case.action == Action::Delete {
            ensure!(state.is_empty(), "it was deleted and is {state}");
            return Ok(Outcome::Gone);
        }
        if state == "running" {
            let more = status::wait_for(&container.status_file(), 2, STEPS)?;
            status::check(&more)?;
            self.compare(leaked, SETTLING + stuck::returns_after(&case.place))?;
            return match image {
                Some(_) if self.restore_all && case.way != Way::Restore => {
                    self.restored(true)?;
                    Ok(Outcome::RunsWithImage)
                }
                Some(_) if case.way != Way::Restore => Ok(Outcome::RunsWithImage),
                _ => Ok(Outcome::Runs),
            };
        }
        if case.action == Action::KillProgram && image.is_none() {
            return Ok(Outcome::Gone);
        }
        if image.is_none() {
            bail!("it is {state:?}, and there is no image; {}: {}", ended.status, ended.text.trim());
        }
        // What was restored may have made a step before it was given up.
        self.restored(case.way == Way::Restore)?;
        self.compare(leaked, SETTLING)?;
        Ok(Outcome::Restored)
    }

    /// Restores the image. `again`: of a moment before the last steps.
    fn restored(&self, again: bool) -> Result<()> {
        let container = self.container()?;
        container.try_verb("delete", &["--force"])?;
        if again {
            fs::write(container.status_file(), "")?;
        }
        let ended = container.try_restore("image")?;
        if ended.status != 0 {
            let mut text =
                fs::read_to_string(container.image("image.work").join("restore.log")).unwrap_or_default();
            text = text.lines().filter(|l| l.contains("Error")).collect::<Vec<_>>().join("; ");
            bail!("the image is not restored: {}; {text}", container.last_error().unwrap_or_default());
        }
        wait_until_quiet(LIMIT);
        let lines = status::wait_for(&container.status_file(), 2, STEPS)?;
        status::check(&lines)
    }

    /// Everything that there is more of than before.
    pub fn beyond(&self) -> Result<Vec<String>> {
        let mut leaked = Vec::new();
        self.compare(&mut leaked, SETTLING)?;
        Ok(leaked)
    }

    fn compare(&self, leaked: &mut Vec<String>, patience: Duration) -> Result<()> {
        let container = self.container()?;
        let deadline = Instant::now() + patience;
        let left = loop {
            let now = Inventory::take(self.folder, container).unwrap_or_default();
            let left = now.beyond(&self.before);
            if left.is_empty() || Instant::now() > deadline {
                break left;
            }
            thread::sleep(Duration::from_millis(20));
        };
        leaked.extend(left);
        Ok(())
    }
}
