//! The golden wire vectors of tests/contract/vectors.json: this language's read and write them like all others.
#![cfg(feature = "json")]

mod report;

use base64::{Engine, prelude::BASE64_STANDARD};
use hotgraph::{json, v1};
use prost::{Message, Name};
use serde_json::Value;

fn check<M: Message + Name + Default + PartialEq + std::fmt::Debug>(name: &str, binary: &[u8], text: &str) {
    let from_binary = M::decode(binary).unwrap_or_else(|error| panic!("{name}: {error}"));
    let from_json: M = json::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(from_binary, from_json, "{name}: binary and JSON differ");
    let again = from_json.encode_to_vec();
    assert_eq!(again.len(), binary.len(), "{name}: written as {again:x?}");
    assert_eq!(M::decode(again.as_slice()).as_ref(), Ok(&from_binary), "{name}: read again it differs");
    let written = json::to_string(&from_binary).unwrap_or_else(|error| panic!("{name}: {error}"));
    let value = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(value(&written), value(text), "{name}");
}

/// `check` for the message of a name, by the list of all that there are.
macro_rules! check_any {
    ($kind:expr, $name:expr, $binary:expr, $text:expr; $($message:ident)*) => {
        match $kind {
            $(kind if kind == v1::$message::full_name() => check::<v1::$message>($name, $binary, $text),)*
            kind => panic!("{kind} is not in the list of messages"),
        }
    };
}

#[test]
fn vectors() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/contract/vectors.json");
    let entries: Vec<Value> = serde_json::from_slice(&std::fs::read(path).expect("the vectors")).expect("a list");
    assert!(entries.len() >= 60, "only {} vectors", entries.len());
    for entry in &entries {
        let [name, kind, binary, text] = ["name", "type", "binary", "json"].map(|key| entry[key].as_str().expect(key));
        let binary = BASE64_STANDARD.decode(binary).expect("base64");
        check_any!(kind, name, &binary, text;
            Budget CaptureTimings ChatMessage ChatPrompt Choice ChoiceFinish Client CompleteRequest CompleteResponse
            DetokenizeRequest DetokenizeResponse DrainRequest DrainResponse EvictGraphRequest EvictGraphResponse
            ExportProfileRequest ExportProfileResponse Finished GenerateRequest GenerateResponse GetBudgetRequest
            GetBudgetResponse GetGraphRequest GetGraphResponse GetModelRequest GetModelResponse GetStatusRequest
            GetStatusResponse Graph GraphCacheStatus GraphEvent GraphKey GraphPolicy GraphProfile
            ImportProfileRequest ImportProfileResponse KvCacheStatus ListClientsRequest ListClientsResponse
            ListGraphsRequest ListGraphsResponse ListModelsRequest ListModelsResponse LogitBias Model ModelLimits
            OutputOptions PinGraphRequest PinGraphResponse PinLease PrewarmGraphsRequest PrewarmGraphsResponse
            ProfileEntry Receipt ResumedChoice SamplingParams SchedulerStatus Started StepGroup StopConditions
            Timings TokenIds TokenLogprob TokenLogprobs TokenizeRequest TokenizeResponse Tokens UnpinGraphRequest
            UnpinGraphResponse UpdateBudgetRequest UpdateBudgetResponse Usage WatchGraphsRequest WatchGraphsResponse
        );
    }
    report::passed("vectors");
}

#[test]
fn what_is_no_message_is_refused() {
    for wrong in ["", "{", "[]", "{\"none\": 1}", "{} {}", "{\"numSteps\": \"x\"}"] {
        assert!(json::from_str::<v1::SchedulerStatus>(wrong).is_err(), "{wrong}");
    }
}
