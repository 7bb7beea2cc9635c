//! Containers of the sample program, run by phos-runc or by the lower runtime alone.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use phos_engine::lower;

use crate::bundle::{Bundle, Gpu};
use crate::status::{self, Status};
use crate::tools::Tools;

/// Longest any single command may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A private root for containers; everything in it is removed when it is dropped.
pub struct Place {
    /// The programs.
    pub tools: Tools,
    folder: tempfile::TempDir,
    /// Added to every command's environment.
    pub env: BTreeMap<String, OsString>,
    /// The same for a while, where containers that live borrow the place.
    overlay: Mutex<BTreeMap<String, OsString>>,
    /// The GPU that containers of the sample get.
    pub gpu: Gpu,
    containers: AtomicU32,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status.
    pub status: i32,
    /// Standard output and standard error.
    pub text: String,
}

impl Place {
    /// A new one, with the simulated GPU.
    pub fn new(tools: &Tools) -> Result<Self> {
        Self::with_gpu(tools, Gpu::Simulated)
    }

    /// A new one.
    pub fn with_gpu(tools: &Tools, gpu: Gpu) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("phos-test-").tempdir()?;
        let path = |name: &str| folder.path().join(name).into_os_string();
        let mut env = BTreeMap::from([
            ("PHOS_STATE_DIR".to_string(), path("state")),
            ("PHOS_CONFIG".to_string(), path("config.toml")),
            ("PHOS_LOWER_RUNTIME".to_string(), tools.runc.clone().into()),
            ("PHOS_CRIU".to_string(), tools.criu.clone().into()),
            ("PHOS_LIB_DIR".to_string(), tools.built.clone().into()),
            ("PHOS_REPORT".to_string(), path("report.json")),
        ]);
        let libcuda = match &gpu {
            Gpu::Real(library) => library.clone(),
            _ => tools.program("libsimcuda.so"),
        };
        env.insert("PHOS_LIBCUDA".to_string(), libcuda.into());
        let (overlay, containers) = (Mutex::default(), AtomicU32::new(0));
        Ok(Place { tools: tools.clone(), folder, env, overlay, gpu, containers })
    }

    /// A path in the place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Replaces what is added to every command's environment beside `env`.
    pub fn overlay<'a>(&self, variables: impl IntoIterator<Item = (&'a str, OsString)>) {
        let mut overlay = self.overlay.lock().unwrap_or_else(|e| e.into_inner());
        *overlay = variables.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    }

    /// The report of the last checkpoint or restore.
    pub fn report(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&fs::read(self.path("report.json"))?)?)
    }

    /// Runs a program with a limit on its time. What it prints comes back, unless a container would inherit its streams
    /// (`inherited`): CRIU cannot dump one that writes to a file of the host.
    pub fn command(&self, program: &Path, words: &[&str], inherited: bool) -> Result<Ended> {
        let output = tempfile::tempfile_in(self.folder.path())?;
        let mut command = Command::new(program);
        command.args(words).envs(&self.env);
        command.envs(self.overlay.lock().unwrap_or_else(|e| e.into_inner()).iter());
        let criu = self.tools.criu.parent().unwrap_or(Path::new("/"));
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", criu.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if !inherited {
            command.stdout(output.try_clone()?).stderr(output.try_clone()?);
        }
        let mut child = command.current_dir(self.folder.path()).spawn()?;
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    child.kill()?;
                    bail!("{} {words:?} took longer than {LIMIT:?}", program.display());
                }
                None => thread::sleep(Duration::from_millis(1)),
            }
        };
        use std::io::{Read, Seek};
        let (mut text, mut output) = (String::new(), output);
        output.rewind()?;
        output.read_to_string(&mut text)?;
        Ok(Ended { status: status.code().unwrap_or(255), text })
    }

    /// A container of the sample program with these options, not started yet.
    pub fn sample(&self, options: &[&str]) -> Result<Container<'_>> {
        let args =
            [&["/usr/bin/phos-sample", "--out", "/out/status", "--stop-file", "/out/stop"], options].concat();
        self.container(&args, &self.gpu)
    }

    /// The bundle of a container that was made here.
    pub fn bundle(&self, id: &str) -> Bundle {
        let path = self.path(id);
        Bundle { out: path.join("out"), path }
    }

    /// A container of any command.
    pub fn container(&self, args: &[&str], gpu: &Gpu) -> Result<Container<'_>> {
        let number = self.containers.fetch_add(1, Ordering::SeqCst);
        // The cgroup hierarchy is the machine's: names must not meet another test's.
        let unique =
            self.folder.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let id = format!("{unique}-{number}");
        let bundle = Bundle::make(&self.tools, &self.path(&id), &id, args, gpu)?;
        Ok(Container { place: self, id, bundle, runtime: self.tools.program("phos-runc") })
    }
}

impl Drop for Place {
    /// What a runtime or CRIU has left mounted in there (the machine's cgroups, for one) must not be removed with it.
    fn drop(&mut self) {
        lower::release(self.folder.path());
    }
}

/// One container.
pub struct Container<'a> {
    /// Where it is.
    pub place: &'a Place,
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: Bundle,
    /// The runtime that runs it.
    pub runtime: PathBuf,
}

impl Container<'_> {
    /// Runs a verb of the runtime on this container, whatever comes of it.
    pub fn try_verb(&self, verb: &str, flags: &[&str]) -> Result<Ended> {
        self.try_verb_through(None, verb, flags)
    }

    /// The same, with the runtime as the child of a shell that takes it with it when it is killed, as engines' shims do.
    pub fn try_verb_through(&self, shell: Option<&str>, verb: &str, flags: &[&str]) -> Result<Ended> {
        let root = self.place.path("root");
        let log = self.place.path(&format!("{}.log", self.id));
        let mut words =
            vec!["--root", root.to_str().context("path")?, "--log", log.to_str().context("path")?];
        words.extend(["--log-format", "json", verb]);
        words.extend(flags);
        words.push(&self.id);
        let inherited = matches!(verb, "create" | "run" | "restore");
        match shell {
            Some(script) => {
                let runtime = self.runtime.to_str().context("path")?;
                let words = [&["-c", script, runtime], words.as_slice()].concat();
                self.place.command(Path::new("/bin/sh"), &words, inherited)
            }
            None => self.place.command(&self.runtime, &words, inherited),
        }
    }

    /// Runs a verb that must succeed.
    pub fn verb(&self, verb: &str, flags: &[&str]) -> Result<String> {
        let ended = self.try_verb(verb, flags)?;
        if ended.status != 0 {
            bail!("{verb} ended with {}: {}\n{}", ended.status, ended.text, self.logs());
        }
        Ok(ended.text)
    }

    /// The last lines of every log there is, for a failed test.
    pub fn logs(&self) -> String {
        let script = "for f in state/*/engine.log */*.work/*.log *.work/*.log; do [ -s $f ] && echo \"--- $f\" && \
                      grep -E 'Error|rror:|WARN|ERROR|Warn' $f | tail -n 20; done";
        let output = Command::new("sh").arg("-c").arg(script).current_dir(self.place.folder.path()).output();
        let stdout = output.map(|o| o.stdout).unwrap_or_default();
        String::from_utf8_lossy(&stdout).into_owned()
    }

    /// Creates and starts it.
    pub fn start(&self) -> Result<()> {
        let bundle = self.bundle.path.to_str().context("path")?.to_string();
        self.verb("create", &["--bundle", &bundle])?;
        self.verb("start", &[])?;
        Ok(())
    }

    /// An image folder of this container.
    pub fn image(&self, name: &str) -> PathBuf {
        self.place.path(&format!("{}.{name}", self.id))
    }

    /// The flags that name an image folder of it.
    pub fn image_flags(&self, name: &str) -> Result<Vec<String>> {
        let image = self.image(name).to_str().context("path")?.to_string();
        let work = format!("{image}.work");
        fs::create_dir_all(&work)?;
        Ok(vec!["--image-path".into(), image, "--work-path".into(), work])
    }

    /// Checkpoints it, whatever comes of it.
    pub fn try_checkpoint(&self, name: &str, leave_running: bool) -> Result<Ended> {
        self.try_checkpoint_with(name, if leave_running { &["--leave-running"] } else { &[] })
    }

    /// Checkpoints it with more flags, whatever comes of it.
    pub fn try_checkpoint_with(&self, name: &str, more: &[&str]) -> Result<Ended> {
        let flags = self.image_flags(name)?;
        let mut words: Vec<&str> = flags.iter().map(String::as_str).collect();
        words.extend(more);
        self.try_verb("checkpoint", &words)
    }

    /// Checkpoints it with more flags; the report comes back.
    pub fn checkpoint_with(&self, name: &str, more: &[&str]) -> Result<serde_json::Value> {
        let ended = self.try_checkpoint_with(name, more)?;
        if ended.status != 0 {
            bail!("checkpoint ended with {}: {}\n{}", ended.status, ended.text, self.logs());
        }
        self.place.report()
    }

    /// Sets an annotation, before it is created.
    pub fn annotate(&self, name: &str, value: &str) -> Result<()> {
        let config = self.bundle.path.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config)?)?;
        spec["annotations"][name] = value.into();
        Ok(fs::write(&config, serde_json::to_vec(&spec)?)?)
    }

    /// Checkpoints it.
    pub fn checkpoint(&self, name: &str, leave_running: bool) -> Result<()> {
        let ended = self.try_checkpoint(name, leave_running)?;
        if ended.status != 0 {
            bail!("checkpoint ended with {}: {}\n{}", ended.status, ended.text, self.logs());
        }
        Ok(())
    }

    /// Restores it, whatever comes of it.
    pub fn try_restore(&self, name: &str) -> Result<Ended> {
        self.try_restore_with(name, &[])
    }

    /// Restores it with more flags, whatever comes of it.
    pub fn try_restore_with(&self, name: &str, more: &[&str]) -> Result<Ended> {
        let flags = self.image_flags(name)?;
        let bundle = self.bundle.path.to_str().context("path")?.to_string();
        let mut words: Vec<&str> = flags.iter().map(String::as_str).collect();
        words.extend(["--detach", "--bundle", &bundle]);
        words.extend(more);
        self.try_verb("restore", &words)
    }

    /// Restores it.
    pub fn restore(&self, name: &str) -> Result<()> {
        let ended = self.try_restore(name)?;
        if ended.status != 0 {
            bail!("restore ended with {}: {}\n{}", ended.status, ended.text, self.logs());
        }
        Ok(())
    }

    /// Stops it by a checkpoint, and restores it from that.
    pub fn stop_and_restore(&self, name: &str) -> Result<()> {
        self.checkpoint(name, false)?;
        self.verb("delete", &["--force"])?;
        self.restore(name)
    }

    /// The sample's status file.
    pub fn status_file(&self) -> PathBuf {
        self.bundle.out.join("status")
    }

    /// Waits for further steps; all lines so far must be right.
    pub fn steps(&self, more: usize) -> Result<Vec<Status>> {
        let lines = status::wait_for(&self.status_file(), more, Duration::from_secs(60))
            .with_context(|| format!("{}\n{}", self.state().unwrap_or_default(), self.logs()))?;
        status::check(&lines)?;
        Ok(lines)
    }

    /// `running`, `stopped` and so on; empty if the runtime does not know it.
    pub fn state(&self) -> Result<String> {
        let ended = self.try_verb("state", &[])?;
        if ended.status != 0 {
            return Ok(String::new());
        }
        let value: serde_json::Value = serde_json::from_str(&ended.text).context("state is JSON")?;
        Ok(value["status"].as_str().unwrap_or_default().to_string())
    }

    /// Host process id of its first process.
    pub fn pid(&self) -> Result<i32> {
        let value: serde_json::Value = serde_json::from_str(&self.verb("state", &[])?)?;
        Ok(value["pid"].as_i64().unwrap_or(0) as i32)
    }

    /// The last error in the runtime's log file.
    pub fn last_error(&self) -> Result<String> {
        let log = fs::read_to_string(self.place.path(&format!("{}.log", self.id)))?;
        let line = log.lines().last().context("the log is empty")?;
        let value: serde_json::Value = serde_json::from_str(line)?;
        if value["level"] != "error" {
            bail!("the log's last line is no error: {line}");
        }
        Ok(value["msg"].as_str().unwrap_or_default().to_string())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.try_verb("delete", &["--force"]);
        // runc leaves the cgroup of a container that CRIU has ended.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&self.id));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.id));
    }
}
