//! Programs that stand in for the lower runtime and for CRIU, and have them killed in the middle of their work.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::container::Place;

/// Stands in for the lower runtime and kills it in the middle of a checkpoint or restore, if it is told to.
fn lower(real: &Path) -> String {
    format!(
        "#!/bin/sh\ncase \" $* \" in *' checkpoint '*|*' restore '*) [ -z \"$FAULT_LOWER\" ] || {{ \"{real}\" \"$@\" & p=$!; \
         sleep $FAULT_LOWER; kill -9 $p; wait $p; exit; }} ;; esac\nexec \"{real}\" \"$@\"\n",
        real = real.display()
    )
}

/// Becomes CRIU, as a child of the lower runtime's, after leaving behind what kills it: after a while, or in one of the scripts
/// that CRIU runs between its steps. Others can be killed with it.
fn criu(real: &Path) -> String {
    format!(
        "#!/bin/sh\nforeground=$(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status)\n\
         case \"$FAULT_WITH\" in foreground) with=$foreground ;; all) with=\"$foreground $PPID\" ;; *) with= ;; esac\n\
         export FAULT_PIDS=\"$with $$\"\n\
         [ -z \"$FAULT_CRIU\" ] || ( (sleep $FAULT_CRIU; kill -9 $FAULT_PIDS && : >\"$PHOS_FAULT_DIR/struck0\") 3>&- & )\n\
         [ -z \"$FAULT_CRIU_AT\" ] || grep -q action-script \"$CRIU_CONFIG_FILE\" || \
         echo \"action-script $0-action\" >>\"$CRIU_CONFIG_FILE\"\nexec \"{}\" \"$@\"\n",
        real.display()
    )
}

/// What CRIU runs between its steps.
const CRIU_ACTION: &str = "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != \"$FAULT_CRIU_AT\" ] || \
                           { : >\"$PHOS_FAULT_DIR/struck0\"; kill -9 $FAULT_PIDS; }\n";

fn script(path: PathBuf, text: &str) -> Result<()> {
    fs::write(&path, text)?;
    Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
}

/// Puts them into a place.
pub fn install(place: &Place) -> Result<()> {
    fs::create_dir_all(place.path("criu-wrapper"))?;
    script(place.path("criu-wrapper/criu"), &criu(&place.tools.criu))?;
    script(place.path("criu-wrapper/criu-action"), CRIU_ACTION)?;
    script(place.path("lower-wrapper"), &lower(&place.tools.runc))
}

/// Who is killed together with CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum With {
    /// Nobody.
    Nobody,
    /// The runtime's foreground.
    Foreground,
    /// The foreground and the lower runtime.
    All,
}

/// When CRIU is killed.
#[derive(Debug, Clone, Copy)]
pub enum When<'a> {
    /// So many milliseconds after its start.
    After(u32),
    /// When it has come to where it runs its action scripts with this word.
    At(&'a str),
}

fn seconds(ms: u32) -> OsString {
    format!("{}", f64::from(ms) / 1e3).into()
}

/// The environment that has the lower runtime killed `ms` milliseconds after its start.
pub fn kill_lower(place: &Place, ms: u32) -> Vec<(&'static str, OsString)> {
    vec![("PHOS_LOWER_RUNTIME", place.path("lower-wrapper").into()), ("FAULT_LOWER", seconds(ms))]
}

/// The environment that has CRIU killed; `PHOS_FAULT_DIR` must be a folder.
pub fn kill_criu(place: &Place, when: When<'_>, with: With) -> Vec<(&'static str, OsString)> {
    let with = match with {
        With::Nobody => "",
        With::Foreground => "foreground",
        With::All => "all",
    };
    let when = match when {
        When::After(ms) => ("FAULT_CRIU", seconds(ms)),
        When::At(action) => ("FAULT_CRIU_AT", action.into()),
    };
    vec![("PHOS_CRIU", place.path("criu-wrapper/criu").into()), when, ("FAULT_WITH", with.into())]
}
