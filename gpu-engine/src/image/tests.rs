use std::fs;
use std::path::Path;

use super::chunks::FileKind;
use super::manifest::MOST_CHUNKS;
use super::*;
use crate::device::GpuId;

pub(super) fn manifest(sizes: &[usize]) -> Manifest {
    let mut first_chunk = 0;
    let allocations = sizes
        .iter()
        .enumerate()
        .map(|(i, chunks)| {
            let a = Allocation {
                process: 0,
                id: i as u64,
                gpu: 0,
                address: 0x1000,
                size: (chunks * CHUNK) as u64,
                class: 0,
                flags: 0,
                first_chunk,
            };
            first_chunk += *chunks as u64;
            a
        })
        .collect();
    Manifest {
        version: VERSION,
        features: vec![],
        made_by: "test".into(),
        created: 0,
        container: "c".into(),
        driver: DriverEntry { version: 13000, release: String::new() },
        lower_runtime: String::new(),
        criu: String::new(),
        chunk_size: CHUNK as u64,
        digest: phos_digest::NAME.into(),
        gpus: vec![GpuEntry { uuid: GpuId([7; 16]), name: "g".into(), total_bytes: 1 }],
        processes: vec![ProcessEntry { pid: 1, command: "p".into(), has_library: true }],
        allocations,
        shared: vec![],
        files: vec![],
        index: IndexEntry { size: 0, digest: String::new() },
        parent: None,
        library: None,
        warnings: vec![],
        effective_spec: serde_json::json!({}),
    }
}

/// Chunk `n` of the test image; every third is zero.
fn chunk(n: u64) -> Vec<u8> {
    if n % 3 == 2 { vec![0; CHUNK] } else { (0..CHUNK).map(|i| (i as u64 * (n + 1) + n) as u8).collect() }
}

/// Puts chunks from `first` on through `lane` and records them in `table`.
fn put(writer: &ImageWriter, lane: usize, first: usize, count: usize, table: &mut [Option<Saved>]) {
    let data: Vec<u8> = (first..first + count).flat_map(|n| chunk(n as u64)).collect();
    let digests: Vec<_> = data.chunks(CHUNK).map(phos_digest::digest).collect();
    let mut places: Vec<_> = table[first..first + count].iter().map(|s| s.map(|(_, place)| place)).collect();
    writer.put(lane, &data, &digests, &mut places).unwrap();
    for (n, (digest, place)) in digests.into_iter().zip(places).enumerate() {
        table[first + n] = place.map(|p| (digest, p));
    }
}

pub(super) fn write(folder: &Path) {
    let writer = ImageWriter::create(folder, 2, Codec::None).unwrap();
    let mut table = vec![None; 7];
    put(&writer, 0, 0, 5, &mut table);
    put(&writer, 1, 5, 1, &mut table);
    put(&writer, 1, 6, 1, &mut table);
    assert_eq!(writer.written(), 5 * CHUNK as u64);
    // Written again by another thread: nothing moves, nothing grows.
    let before = table.clone();
    put(&writer, 1, 0, 5, &mut table);
    assert_eq!((before, 5 * CHUNK as u64), (table.clone(), writer.written()));
    writer.commit(manifest(&[4, 3]), table).unwrap();
}

fn read_all(folder: &Path) -> Result<Vec<u8>, ImageError> {
    let image = Image::open(folder)?;
    let mut out = Vec::new();
    let (mut buffer, mut unpacker) = (vec![0xff; 4 * CHUNK], Unpacker::default());
    for a in &image.manifest.allocations {
        let extents = image.extents(a, buffer.len());
        for e in &extents {
            assert_eq!(e.at as usize, out.len() - a.first_chunk as usize * CHUNK);
            image.read(e, &mut buffer, &mut unpacker)?;
            out.extend_from_slice(&buffer[..e.count as usize * CHUNK]);
        }
    }
    Ok(out)
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let expected: Vec<u8> = (0..7).flat_map(chunk).collect();
    assert!(read_all(folder.path()).unwrap() == expected);
    assert_eq!(Image::open(folder.path()).unwrap().verify().unwrap(), 5 * CHUNK as u64);
}

#[test]
fn an_open_image_survives_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let image = Image::open(folder.path()).unwrap();
    drop(folder);
    image.verify().unwrap();
}

#[test]
fn every_damaged_byte_is_found() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    for name in [data_file(0), data_file(1), INDEX.to_string()] {
        let path = folder.path().join(&name);
        let good = fs::read(&path).unwrap();
        let step = if name == INDEX { 1 } else { 4099 };
        for at in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert!(read_all(folder.path()).is_err(), "{name} byte {at}");
        }
        for len in [0, 1, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            assert!(read_all(folder.path()).is_err(), "{name} cut to {len}");
        }
        fs::write(&path, &good).unwrap();
    }
    read_all(folder.path()).unwrap();
}

#[test]
fn damaged_manifests_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let path = folder.path().join(MANIFEST);
    let good = fs::read_to_string(&path).unwrap();
    let cases = [
        ("\"version\": 1", "\"version\": 2", "format version 2"),
        ("\"features\": []", "\"features\": [\"chain\"]", "feature 'chain'"),
        ("\"chunk_size\": 262144", "\"chunk_size\": 1", "chunk size"),
        ("phos-gpu-0.img", "../phos-gpu-0.img", "is called"),
        ("\"size\": 1048576", "\"size\": 18446744073709551615", "bytes"),
        ("\"size\": 1048576", "\"size\": 4398046511104", "begins at chunk"),
        ("\"gpu\": 0", "\"gpu\": 9", "not listed"),
        ("\"first_chunk\": 4", "\"first_chunk\": 3", "begins at chunk"),
        ("\"id\": 1", "\"id\": 0", "twice"),
        ("\"pid\": 1", "\"pid\": -1", "cannot exist"),
    ];
    let shared = |entry: &str| format!("\"shared\": [{entry}], \"files\": [");
    let entry = |process, id, allocation| {
        shared(&format!(r#"{{"process": {process}, "id": {id}, "allocation": {allocation}}}"#))
    };
    let lists = [
        (entry(0, 9, 0), "'shared' and the entries"),
        (entry(0, 9, 2), "shared entry 9"),
        (entry(1, 9, 0), "shared entry 9"),
        (entry(0, 1, 0), "entry 1 is listed twice"),
    ];
    let lists = lists.iter().map(|(to, expected)| ("\"files\": [", to.as_str(), *expected));
    for (from, to, expected) in cases.into_iter().chain(lists) {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = Image::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{to}: {error}");
    }
    for len in [0, 10, good.len() / 2, good.len() - 2] {
        fs::write(&path, &good[..len]).unwrap();
        let error = Image::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("manifest is damaged"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(Image::open(folder.path()), Err(ImageError::Missing(_))));
}

#[test]
fn without_commit_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let writer = ImageWriter::create(folder.path(), 2, Codec::None).unwrap();
    put(&writer, 0, 0, 1, &mut [None]);
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let writer = ImageWriter::create(folder.path(), 1, Codec::None).unwrap();
    let mut table = vec![None; 2];
    put(&writer, 0, 0, 1, &mut table);
    let error = writer.commit(manifest(&[2]), table).unwrap_err();
    assert!(error.to_string().contains("never written"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// An image in `folder` whose first three chunks are those of the image in `../base`, and whose fourth is new.
fn write_child(folder: &Path, base: &Path, codec: Codec) {
    let parent = Image::open(base).unwrap();
    let writer = ImageWriter::create(folder, 1, codec).unwrap();
    let own = |(digest, place): &Saved| match *place {
        Location::File { file, offset, packed } => {
            Some((*digest, Location::File { file: file + 1, offset, packed }))
        }
        Location::Zero => Some((*digest, Location::Zero)),
    };
    let mut table: Vec<_> = parent.saved(&parent.manifest.allocations[0]).iter().map(own).collect();
    put(&writer, 0, 3, 1, &mut table);
    assert!(writer.written() > 0, "a place in the parent is never written to");
    let mut manifest = manifest(&[4]);
    manifest.features.push(FEATURE_PARENT.into());
    manifest.parent = Some(ParentEntry { path: "../base".into(), digest: parent.digest });
    writer.commit(manifest, table).unwrap();
}

#[test]
fn an_image_reads_through_to_the_one_it_builds_on() {
    let top = tempfile::tempdir().unwrap();
    let [base, child] = ["base", "child"].map(|n| top.path().join(n));
    for folder in [&base, &child] {
        fs::create_dir(folder).unwrap();
    }
    write(&base);
    write_child(&child, &base, Codec::None);
    assert_eq!(read_all(&child).unwrap(), (0..4).flat_map(chunk).collect::<Vec<_>>());
    // Another image in its place, or none, is noticed.
    let manifest = base.join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"created\": ", "\"created\": 1")).unwrap();
    let error = Image::open(&child).unwrap_err().to_string();
    assert!(error.contains("is not the one it was"), "{error}");
    fs::remove_file(&manifest).unwrap();
    let error = Image::open(&child).unwrap_err().to_string();
    assert!(error.contains("is not there"), "{error}");
}

#[test]
fn a_manifest_cannot_make_a_reader_allocate_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path());
    let path = folder.path().join(MANIFEST);
    let mut manifest: Manifest = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest.allocations.truncate(1);
    // A chunk table that would be 2 TiB long, and is so, as a file with nothing in it.
    manifest.allocations[0].size = (1 << 36) * CHUNK as u64;
    manifest.index.size = ChunkTable::encoded_len(1 << 36);
    fs::write(&path, serde_json::to_string(&manifest).unwrap()).unwrap();
    fs::File::create(folder.path().join(INDEX)).unwrap().set_len(manifest.index.size).unwrap();
    let error = Image::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("bytes") || error.contains("more chunks"), "{error}");
    manifest.allocations[0].size = (MOST_CHUNKS + 1) * CHUNK as u64;
    manifest.index.size = ChunkTable::encoded_len(MOST_CHUNKS + 1);
    fs::write(&path, serde_json::to_string(&manifest).unwrap()).unwrap();
    fs::File::create(folder.path().join(INDEX)).unwrap().set_len(manifest.index.size).unwrap();
    let error = Image::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("more chunks than"), "{error}");
}

proptest::proptest! {
    /// Whatever is done to the two files that a reader interprets, it says yes or no.
    #[test]
    fn no_change_makes_a_reader_panic(
        which in 0usize..2,
        codec in proptest::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd]),
        changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), proptest::prelude::any::<u8>()), 1..6),
        cut: Option<proptest::sample::Index>,
    ) {
        let folder = tempfile::tempdir().unwrap();
        match codec {
            Codec::None => write(folder.path()),
            packed => drop(write_packed(folder.path(), packed)),
        }
        let path = folder.path().join([MANIFEST, INDEX][which]);
        let mut bytes = fs::read(&path).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            // Digits stay digits: numbers are what a reader trusts too easily.
            bytes[at] = if bytes[at].is_ascii_digit() { b'0' + byte % 10 } else { byte };
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(image) = Image::open(folder.path()) {
            let _ = image.verify();
        }
    }
}

/// An image of chunks 0 to 6, of which some are written twice, with other bytes the first time.
fn write_packed(folder: &Path, codec: Codec) -> u64 {
    let writer = ImageWriter::create(folder, 2, codec).unwrap();
    let mut table = vec![None; 7];
    // First small when packed, then not, and the other way round.
    let mut noise = [1u8; 2 * CHUNK];
    let mut state = 1u64;
    noise[CHUNK..].iter_mut().for_each(|b| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *b = (state >> 56) as u8;
    });
    let digests = [phos_digest::digest(&noise[..CHUNK]), phos_digest::digest(&noise[CHUNK..])];
    let mut places = [None; 2];
    writer.put(0, &noise, &digests, &mut places).unwrap();
    (0..2).for_each(|n| table[n] = places[n].map(|p| (digests[n], p)));
    let first = writer.written();
    put(&writer, 1, 0, 5, &mut table);
    put(&writer, 0, 5, 2, &mut table);
    writer.commit(manifest(&[4, 3]), table).unwrap();
    first
}

#[test]
fn packed_chunks_are_read_too() {
    for codec in [Codec::Lz4, Codec::Zstd] {
        let folder = tempfile::tempdir().unwrap();
        let first = write_packed(folder.path(), codec);
        assert!(
            first > CHUNK as u64 && first < 2 * CHUNK as u64,
            "noise as it is, the other one packed: {first}"
        );
        let image = Image::open(folder.path()).unwrap();
        assert_eq!(image.manifest.features, [codec.to_string()]);
        let size: u64 = image.manifest.files.iter().map(|f| f.size).sum();
        assert!(
            size < 3 * CHUNK as u64,
            "{size} bytes for 5 chunks that pack well, and what became of the noise"
        );
        let expected: Vec<u8> = (0..7).flat_map(chunk).collect();
        assert!(read_all(folder.path()).unwrap() == expected);
        // One bit of any packed chunk.
        let (_, Location::File { file, offset, packed }) = image.saved(&image.manifest.allocations[0])[3]
        else {
            panic!("chunk 3 is stored")
        };
        let path = folder.path().join(data_file(file as usize));
        let good = fs::read(&path).unwrap();
        for at in (0..packed as usize).step_by(packed as usize / 50 + 1) {
            let mut bad = good.clone();
            bad[offset as usize + at] ^= 4;
            fs::write(&path, &bad).unwrap();
            let error = read_all(folder.path()).unwrap_err().to_string();
            assert!(error.contains("chunk 3") && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn an_image_may_be_packed_in_another_way_than_its_parent() {
    let top = tempfile::tempdir().unwrap();
    let [base, child] = ["base", "child"].map(|n| top.path().join(n));
    for folder in [&base, &child] {
        fs::create_dir(folder).unwrap();
    }
    write_packed(&base, Codec::Lz4);
    write_child(&child, &base, Codec::Zstd);
    assert_eq!(Image::open(&child).unwrap().manifest.features, ["parent", "zstd"]);
    assert!(read_all(&child).unwrap() == (0..4).flat_map(chunk).collect::<Vec<_>>());
}

#[test]
fn a_table_cannot_say_that_a_chunk_is_packed_as_it_cannot_be() {
    let file = |packed| {
        ChunkTable(vec![(Digest([1, 2]), Location::File { file: 0, offset: 4096, packed })]).encode()
    };
    let read = |packed, size, packs| ChunkTable::decode(&file(packed), 1, &[FileKind { size, packs }]);
    assert!(read(5000, 4096 + 8192, true).is_ok());
    assert!(read(5000, 4096 + 8191, true).unwrap_err().contains("outside its file"));
    assert!(read(5000, 1 << 20, false).unwrap_err().contains("packed as it cannot be"));
    assert!(read(CHUNK as u32, 1 << 20, true).unwrap_err().contains("packed as it cannot be"));
    assert!(read(u32::MAX, 1 << 20, true).is_err());
}
