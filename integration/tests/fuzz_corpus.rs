//! What the fuzzers have found their way with (`integration/fuzz/corpus`) goes through the same functions again.

use std::fs;
use std::path::Path;

#[test]
fn every_input_of_the_corpus_is_taken_without_a_panic() {
    if Path::new("/dev/shm").is_dir() {
        // SAFETY: this program's only test, before it starts anything.
        unsafe { std::env::set_var("TMPDIR", "/dev/shm") };
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut folders: Vec<_> =
        fs::read_dir(&corpus).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    folders.sort();
    let mut targets: Vec<_> = phos_fuzz::TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    targets.sort();
    assert_eq!(folders, targets, "one folder for each target");
    for (name, target) in phos_fuzz::TARGETS {
        let inputs: Vec<_> = fs::read_dir(corpus.join(name)).unwrap().flatten().map(|e| e.path()).collect();
        assert!(inputs.len() > 1, "{name} has no corpus");
        for input in inputs {
            let bytes = fs::read(&input).unwrap();
            let taken = std::panic::catch_unwind(|| target(&bytes));
            assert!(taken.is_ok(), "{name} panics on {}", input.display());
        }
    }
}
