#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| phos_fuzz::args(data));
