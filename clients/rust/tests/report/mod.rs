//! What the tests tell the harness of tests/interop.
#![allow(dead_code)] // each test program uses a part

use std::{env, fs, io::Write};

use serde_json::Value;

/// The addresses of the daemons that tests/interop started. None when nobody did: the test then passes without a call.
pub fn daemons() -> Option<Value> {
    let Some(path) = env::var_os("HOTGRAPH_INTEROP") else {
        eprintln!(
            "skipped: needs daemons; run clients/rust/test.sh under python -m tests.interop, or make test-client-rust"
        );
        return None;
    };
    Some(serde_json::from_slice(&fs::read(path).expect("HOTGRAPH_INTEROP can be read")).expect("it is JSON"))
}

/// Reports a case of tests/interop/cases.json; called at the end of its test.
pub fn passed(case: &str) {
    if let Some(path) = env::var_os("HOTGRAPH_INTEROP_REPORT").filter(|path| !path.is_empty()) {
        let mut file = fs::OpenOptions::new().append(true).open(path).expect("the report can be written");
        file.write_all(format!("passed {case}\n").as_bytes()).expect("the report can be written");
    }
}
