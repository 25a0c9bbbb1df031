//! The cases of tests/interop/cases.json against real daemons with a real model.
#![cfg(feature = "json")] // whose serde_json reads the addresses

mod report;

use std::time::{Duration, Instant};

use hotgraph::{
    Builder, Client, Error, Failure, Generation, Resume, ResumePolicy,
    health::{HealthCheckRequest, health_check_response::ServingStatus},
    prost_types,
    tonic::{self, Code, Request},
    v1::{self, ErrorReason, generate_response::Event, tokenize_request::Input},
};
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::sleep;

const PATIENCE: Duration = Duration::from_secs(60); // for what takes a second on a quiet machine

/// A pangram with an emoji, control characters and NUL.
const STRANGE: &str =
    "Zwölf Boxkämpfer 漢字 😀 e\u{301} tab\t newline\n return\r bell\u{7} escape\u{1b} delete\u{7f} nul\0 end";

/// What a test has: the addresses, and the daemons to itself.
struct World {
    told: Value,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    fn told(&self, path: &str) -> &str {
        self.told.pointer(path).and_then(Value::as_str).expect(path)
    }

    /// Without retries, so that each refusal is seen at once.
    fn client(&self) -> Client {
        Client::builder(self.told("/unix")).max_attempts(1).build().expect("a client")
    }
}

async fn world() -> Option<World> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    let told = report::daemons()?;
    Some(World { told, _alone: ALONE.lock().await })
}

/// A test of a case, reported when it has passed.
macro_rules! cases {
    ($($name:ident: $run:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if let Some(world) = world().await {
                tokio::time::timeout(PATIENCE * 3, $run(&world)).await.expect("ends in time");
                report::passed(stringify!($name));
            }
        }
    )*};
}

cases! {
    unary_empty: unary_empty_;
    unary_large: unary_large_;
    request_too_large: request_too_large_;
    text: text_;
    stream: stream_;
    stream_is_unary: stream_is_unary_;
    chat: chat_;
    slow_reader: slow_reader_;
    cancel_at_once: cancel_at_once_;
    cancel_midway: cancel_midway_;
    deadline: deadline_;
    timeout_field: timeout_field_;
    violations: violations_;
    status_message: status_message_;
    not_found: not_found_;
    retry_info: retry_info_;
    unimplemented: unimplemented_;
    client_id: client_id_;
    pages: pages_;
    graphs: graphs_;
    health: health_;
    tcp: tcp_;
    tls: tls_;
    mutual_tls: mutual_tls_;
    token: token_;
    drain_and_resume: drain_and_resume_;
    cut_and_resume: cut_and_resume_;
    headers_cut: headers_cut_;
    soak: soak_;
}

fn greedy(prompt: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(hotgraph::text(prompt)),
        max_tokens: Some(max_tokens),
        sampling: Some(v1::SamplingParams { temperature: Some(0.0), ..Default::default() }),
        stop: Some(v1::StopConditions { ignore_eos: Some(true), ..Default::default() }),
        ..Default::default()
    }
}

fn seeded() -> v1::GenerateRequest {
    let sampling = v1::SamplingParams { seed: Some(7), temperature: Some(0.9), ..Default::default() };
    v1::GenerateRequest { sampling: Some(sampling), ..greedy("Once upon a time", 64) }
}

/// The error that a call must have failed with.
fn refusal<T: std::fmt::Debug>(
    outcome: Result<T, impl Into<Error>>,
    code: Code,
    reason: Option<ErrorReason>,
) -> (Error, Failure) {
    let error: Error = outcome.expect_err("must be refused").into();
    let failure = error.failure().expect("of a call").clone();
    assert_eq!((failure.code, failure.reason), (code, reason), "{error}");
    (error, failure)
}

async fn status(client: &Client) -> v1::GetStatusResponse {
    client.admin().get_status(v1::GetStatusRequest {}).await.expect("a status").into_inner()
}

/// Until no request holds a slot.
async fn wait_free(client: &Client) {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = status(client).await;
        let scheduler = now.scheduler.expect("a scheduler");
        let num_used = now.kv_cache.expect("a cache").num_used_blocks;
        if scheduler.num_running == 0 && scheduler.num_waiting == 0 && num_used == 0 {
            return;
        }
        assert!(Instant::now() < end, "slots are still held: {scheduler:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

async fn tokenize(client: &Client, text: String) -> Result<v1::TokenizeResponse, tonic::Status> {
    let request =
        v1::TokenizeRequest { input: Some(Input::Text(text)), add_special_tokens: Some(false), ..Default::default() };
    Ok(client.inference().tokenize(request).await?.into_inner())
}

/// Reads until the first choice has so many tokens.
async fn read_tokens(generation: &mut Generation, num_tokens: usize) {
    while generation.choices()[0].token_ids.len() < num_tokens {
        generation.next().await.expect("more").expect("no error");
    }
}

async fn unary_empty_(world: &World) {
    let answer = status(&world.client()).await;
    assert_eq!((answer.state(), answer.model.as_str()), (v1::DaemonState::Serving, world.told("/model")));
}

async fn unary_large_(world: &World) {
    let text = "All that is gold does not glitter; é漢😀 ".repeat((1 << 20) / 45);
    let answer = tokenize(&world.client(), text.clone()).await.expect("tokens");
    assert!(answer.pieces.concat() == text.as_bytes());
}

async fn request_too_large_(world: &World) {
    let refused = tokenize(&world.client(), "x".repeat(5 << 20)).await;
    let (error, failure) = refusal(refused, Code::ResourceExhausted, Some(ErrorReason::MessageTooLarge));
    assert_eq!(failure.metadata["limit_bytes"], (4 << 20).to_string());
    assert!(matches!(error, Error::Request(_)));
}

async fn text_(world: &World) {
    let client = world.client();
    let token_ids = tokenize(&client, STRANGE.to_owned()).await.expect("tokens").token_ids;
    let request = v1::DetokenizeRequest { token_ids, ..Default::default() };
    assert_eq!(client.inference().detokenize(request).await.expect("text").into_inner().text, STRANGE);
}

async fn stream_(world: &World) {
    let client = world.client();
    let mut generation = client.generate(greedy("The sky is", 12));
    let (mut kinds, mut text, mut num_tokens) = (Vec::new(), String::new(), 0);
    while let Some(event) = generation.next().await {
        kinds.push(match event.expect("no error") {
            Event::Started(_) => "started",
            Event::Tokens(tokens) => {
                text += &tokens.text;
                num_tokens += tokens.token_ids.len();
                "tokens"
            }
            Event::Finished(_) => "finished",
        });
    }
    kinds.dedup();
    assert_eq!(kinds, ["started", "tokens", "finished"]);
    let finished = generation.finished().expect("finished");
    assert_eq!((num_tokens, finished.usage.expect("usage").completion_tokens), (12, 12));
    assert!(text == generation.text() && !text.is_empty());
    assert!(
        Duration::try_from(finished.timings.expect("timings").total.expect("total")).expect("time") > Duration::ZERO
    );
    assert!(finished.receipt.as_ref().expect("a receipt").num_steps > 0);
    assert_eq!(finished.choices[0].reason(), v1::FinishReason::Length);
    wait_free(&client).await;
}

async fn stream_is_unary_(world: &World) {
    let client = world.client();
    let request = v1::GenerateRequest {
        num_choices: Some(2),
        sampling: Some(v1::SamplingParams { seed: Some(u64::MAX), temperature: Some(0.8), ..Default::default() }),
        output: Some(v1::OutputOptions { logprobs: Some(2), ..Default::default() }),
        stop: None,
        ..greedy("Once upon a time", 16)
    };
    let streamed = client.generate(request.clone()).result().await.expect("an answer");
    let unary = client.complete(request).await.expect("an answer");
    assert_eq!((unary.seed, unary.choices.len()), (u64::MAX, 2));
    let told = |answer: &v1::CompleteResponse| -> Vec<_> {
        answer.choices.iter().map(|choice| (choice.token_ids.clone(), choice.text.clone())).collect()
    };
    assert_eq!(told(&streamed), told(&unary));
    for choice in streamed.choices.iter().chain(&unary.choices) {
        assert_eq!(choice.logprobs.len(), choice.token_ids.len());
    }
}

async fn chat_(world: &World) {
    let turns = [hotgraph::system("Be brief."), hotgraph::user("What is the capital of France?")];
    let request = v1::GenerateRequest { prompt: Some(hotgraph::chat(turns)), stop: None, ..greedy("", 24) };
    let mut generation = world.client().generate(request);
    let mut text = String::new();
    while let Some(piece) = generation.next_text().await {
        text += &piece.expect("no error");
    }
    assert!(text.contains("Paris"), "{text}");
}

async fn slow_reader_(world: &World) {
    let client = world.client();
    let fast = client.generate(greedy("The sky is", 40)).result().await.expect("an answer");
    let mut slow = client.generate(greedy("The sky is", 40));
    read_tokens(&mut slow, 2).await;
    client.complete(greedy("others", 4)).await.expect("others are served");
    sleep(Duration::from_secs(1)).await;
    let answer = slow.result().await.expect("an answer");
    assert_eq!(answer.choices[0].token_ids, fast.choices[0].token_ids);
}

async fn cancel_at_once_(world: &World) {
    let client = world.client();
    let num_before = status(&client).await.scheduler.expect("a scheduler").num_requests;
    let mut generation = client.generate(greedy("The sky is", 1000));
    // Far enough that it is sent, not so far that an event is there.
    while status(&client).await.scheduler.expect("a scheduler").num_requests == num_before {
        let first = tokio::time::timeout(Duration::from_micros(100), generation.next()).await;
        if first.is_ok() {
            break; // it was faster
        }
    }
    generation.close();
    refusal(generation.next().await.expect("told"), Code::Cancelled, None);
    assert!(generation.next().await.is_none());
    wait_free(&client).await;
    // Left before it was sent.
    drop(client.generate(greedy("The sky is", 1000)));
    let mut closed = client.generate(greedy("The sky is", 1000));
    closed.close();
    refusal(closed.result().await, Code::Cancelled, None);
    wait_free(&client).await;
}

async fn cancel_midway_(world: &World) {
    let client = world.client();
    let mut generation = client.generate(greedy("The sky is", 1000));
    read_tokens(&mut generation, 3).await;
    assert_eq!(status(&client).await.scheduler.expect("a scheduler").num_running, 1);
    drop(generation);
    wait_free(&client).await;
    let mut again = client.generate(greedy("The sky is", 1000));
    read_tokens(&mut again, 3).await;
    again.close();
    let (error, _) = refusal(again.result().await, Code::Cancelled, None);
    assert!(matches!(error, Error::Cancelled(_)));
    wait_free(&client).await;
}

async fn deadline_(world: &World) {
    let client = world.client();
    let limit = Duration::from_millis(700);
    let begin = Instant::now();
    let streamed = client.generate(greedy("The sky is", 1000)).timeout(limit).result().await;
    assert!(matches!(streamed, Err(Error::Deadline(_))), "{streamed:?}");
    assert!(begin.elapsed() < limit + Duration::from_secs(1), "{:?}", begin.elapsed());
    wait_free(&client).await;
    let begin = Instant::now();
    let mut unary = Request::new(greedy("The sky is", 1000));
    unary.set_timeout(limit);
    let refused = client.complete(unary).await;
    assert!(matches!(refused, Err(Error::Deadline(_))), "{refused:?}");
    assert!(begin.elapsed() < limit + Duration::from_secs(1), "{:?}", begin.elapsed());
    wait_free(&client).await;
}

async fn timeout_field_(world: &World) {
    let client = world.client();
    let timeout = Some(prost_types::Duration { seconds: 0, nanos: 500_000_000 });
    let request = v1::GenerateRequest { timeout, ..greedy("The sky is", 1000) };
    let refused = client.generate(request).result().await;
    refusal(refused, Code::DeadlineExceeded, Some(ErrorReason::DeadlineExceeded));
    wait_free(&client).await;
}

async fn violations_(world: &World) {
    let request = v1::GenerateRequest {
        request_id: "no spaces".into(),
        prompt: Some(hotgraph::text("")),
        max_tokens: Some(0),
        num_choices: Some(17),
        sampling: Some(v1::SamplingParams {
            temperature: Some(3.0),
            top_p: Some(0.0),
            min_p: Some(2.0),
            repetition_penalty: Some(0.0),
            presence_penalty: Some(-3.0),
            frequency_penalty: Some(3.0),
            logit_bias: vec![v1::LogitBias { token_id: 1, bias: 101.0 }],
            ..Default::default()
        }),
        stop: Some(v1::StopConditions { strings: vec![String::new()], ..Default::default() }),
        output: Some(v1::OutputOptions { logprobs: Some(21), ..Default::default() }),
        timeout: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        ..Default::default()
    };
    let refused = world.client().complete(request).await;
    let (_, mut failure) = refusal(refused, Code::InvalidArgument, Some(ErrorReason::InvalidRequest));
    failure.violations.sort_by(|one, other| one.field.cmp(&other.field));
    let fields: Vec<_> = failure.violations.iter().map(|violation| violation.field.as_str()).collect();
    let wanted = [
        "max_tokens",
        "num_choices",
        "output.logprobs",
        "request_id",
        "sampling.frequency_penalty",
        "sampling.logit_bias[0].bias",
        "sampling.min_p",
        "sampling.presence_penalty",
        "sampling.repetition_penalty",
        "sampling.temperature",
        "sampling.top_p",
        "stop.strings[0]",
        "text",
        "timeout",
    ];
    assert_eq!(fields, wanted);
    assert!(failure.violations.iter().all(|violation| !violation.description.is_empty()));
}

async fn status_message_(world: &World) {
    let name = "naïve 😀\t\n\u{7f}%".to_owned();
    let refused = world.client().inference().get_model(v1::GetModelRequest { name: name.clone() }).await;
    let (_, failure) = refusal(refused, Code::NotFound, Some(ErrorReason::ModelNotFound));
    assert_eq!(failure.resource.expect("a resource").name, name);
    assert!(failure.message.contains("naïve 😀"), "{}", failure.message);
}

async fn not_found_(world: &World) {
    let refused = world.client().graphs().get_graph(v1::GetGraphRequest { name: "graphs/none".into() }).await;
    let (error, failure) = refusal(refused, Code::NotFound, Some(ErrorReason::GraphNotFound));
    let resource = failure.resource.expect("a resource");
    assert_eq!((resource.kind.as_str(), resource.name.as_str()), ("hotgraph.v1.Graph", "graphs/none"));
    assert!(matches!(error, Error::Request(_)) && !error.is_retryable());
}

async fn retry_info_(world: &World) {
    let client = world.client();
    // What another test captured goes, so that there is something to wait for.
    let states = vec![v1::GraphState::Ready.into()];
    for graph in client.all_graphs(v1::ListGraphsRequest { states, ..Default::default() }).await.expect("graphs") {
        client.graphs().evict_graph(v1::EvictGraphRequest { name: graph.name }).await.expect("evicted");
    }
    let request = v1::GenerateRequest {
        num_choices: Some(7),
        sampling: Some(v1::SamplingParams { top_k: Some(5), ..Default::default() }),
        graph_policy: Some(v1::GraphPolicy { mode: v1::GraphMode::Require.into(), max_wait: None }),
        ..greedy("The sky is", 4)
    };
    let refused = client.generate(request).result().await;
    let (error, failure) = refusal(refused, Code::Unavailable, Some(ErrorReason::GraphNotReady));
    assert!(failure.retry_after.is_some_and(|wait| wait > Duration::ZERO) && error.is_retryable());
}

async fn unimplemented_(world: &World) {
    for path in ["/hotgraph.v1.InferenceService/Dream", "/hotgraph.v1.DreamService/Dream"] {
        let mut stub = tonic::client::Grpc::new(world.client().transport());
        stub.ready().await.expect("ready");
        let codec = tonic_prost::ProstCodec::<v1::GetStatusRequest, v1::GetStatusRequest>::default();
        let path = path.parse().expect("a path");
        let refused = stub.unary(Request::new(v1::GetStatusRequest {}), path, codec).await;
        refusal(refused, Code::Unimplemented, None);
    }
}

async fn client_id_(world: &World) {
    let named = Client::builder(world.told("/unix")).client_id("interop-rust").build().expect("a client");
    named.complete(greedy("hello", 1)).await.expect("an answer");
    let all = world.client().all_clients().await.expect("clients");
    let found = all.iter().find(|other| other.name == "clients/interop-rust").expect("the caller is known");
    assert!(found.user_agent.contains("hotgraph-rust/") && found.num_requests > 0, "{found:?}");
}

async fn prewarmed(client: &Client) -> Vec<v1::Graph> {
    let keys = [1, 2, 3].map(|rows| v1::GraphKey { tokens: 4, rows, sampler: v1::SamplerVariant::Greedy.into() });
    let request =
        v1::PrewarmGraphsRequest { keys: keys.into(), wait: Some(prost_types::Duration { seconds: 30, nanos: 0 }) };
    client.graphs().prewarm_graphs(request).await.expect("graphs").into_inner().graphs
}

async fn pages_(world: &World) {
    let client = world.client();
    assert!(prewarmed(&client).await.len() >= 2, "too few for a list of pages");
    let all = client.all_graphs(v1::ListGraphsRequest { page_size: 1, ..Default::default() }).await.expect("graphs");
    let whole = client.graphs().list_graphs(v1::ListGraphsRequest::default()).await.expect("graphs").into_inner();
    let sorted = |graphs: &[v1::Graph]| {
        let mut names: Vec<_> = graphs.iter().map(|graph| graph.name.clone()).collect();
        names.sort();
        names.dedup();
        names
    };
    assert_eq!(sorted(&all), sorted(&whole.graphs));
    assert_eq!((all.len(), sorted(&all).len()), (whole.total_size as usize, all.len()));
    let models = client.all_models().await.expect("models");
    assert!(!models.is_empty() && models.iter().all(|model| model.id == world.told("/model")));
}

async fn graphs_(world: &World) {
    let client = world.client();
    let ready = prewarmed(&client).await.remove(0);
    assert_eq!(ready.state(), v1::GraphState::Ready);
    let name = || ready.name.clone();
    let mut graphs = client.graphs();
    let got = graphs.get_graph(v1::GetGraphRequest { name: name() }).await.expect("a graph").into_inner();
    assert_eq!(got.graph.expect("a graph").key, ready.key);
    let pinned =
        graphs.pin_graph(v1::PinGraphRequest { name: name(), lease: None }).await.expect("pinned").into_inner();
    assert!(pinned.graph.expect("a graph").pin.expect("a pin").expire_time.is_some());
    graphs.unpin_graph(v1::UnpinGraphRequest { name: name() }).await.expect("unpinned");
    use v1::GraphEventType as Type;
    let mut wanted = [Type::Planned, Type::Published, Type::Pinned, Type::Unpinned].into_iter().peekable();
    let watch = graphs.watch_graphs(v1::WatchGraphsRequest { after_sequence: Some(0) }).await.expect("a watch");
    let (mut events, mut sequence) = (watch.into_inner(), 0);
    while let Some(next) = wanted.peek() {
        let event = events.message().await.expect("no error").expect("more").event.expect("an event");
        assert!(event.sequence > sequence);
        sequence = event.sequence;
        if event.r#type() == *next && event.graph.is_some_and(|graph| graph.name == ready.name) {
            wanted.next();
        }
    }
}

async fn health_(world: &World) {
    let mut health = world.client().health();
    let now = health.check(HealthCheckRequest::default()).await.expect("health").into_inner();
    assert_eq!(now.status(), ServingStatus::Serving);
    let service = "hotgraph.v1.InferenceService".to_owned();
    let mut watch = health.watch(HealthCheckRequest { service }).await.expect("a watch").into_inner();
    assert_eq!(watch.message().await.expect("no error").expect("a state").status(), ServingStatus::Serving);
    let refused = health.check(HealthCheckRequest { service: "none".into() }).await;
    refusal(refused, Code::NotFound, Some(ErrorReason::ServiceNotFound));
}

/// Makes a unary call and a stream.
async fn check(builder: Builder) {
    let client = builder.build().expect("a client");
    let unary = client.complete(greedy("hello", 2)).await.expect("an answer");
    let streamed = client.generate(greedy("hello", 2)).result().await.expect("an answer");
    assert_eq!(streamed.choices[0].token_ids, unary.choices[0].token_ids);
}

async fn fails(builder: Builder, code: Code, reason: Option<ErrorReason>) {
    let mut request = Request::new(greedy("hello", 1));
    request.set_timeout(PATIENCE);
    refusal(builder.max_attempts(1).build().expect("a client").complete(request).await, code, reason);
}

async fn tcp_(world: &World) {
    check(Client::builder(world.told("/tcp"))).await;
    check(Client::builder(format!("ipv4:127.0.0.1:1,{}", world.told("/tcp")))).await; // nobody listens at the first
}

/// Over TLS with the CA of the tests.
fn encrypted(world: &World, part: &str) -> Builder {
    Client::builder(world.told(&format!("/{part}/target")))
        .root_certificates(world.told(&format!("/{part}/root_certificates")))
}

async fn tls_(world: &World) {
    let (target, token) = (world.told("/tls/target"), world.told("/tls/token"));
    check(encrypted(world, "tls").token(token)).await;
    fails(Client::builder(target).tls().token(token), Code::Unavailable, None).await;
    fails(Client::builder(target).token(token), Code::Unavailable, None).await;
}

async fn mutual_tls_(world: &World) {
    let [chain, key] = ["/mutual_tls/certificate_chain", "/mutual_tls/private_key"].map(|path| world.told(path));
    check(encrypted(world, "mutual_tls").identity(chain, key)).await;
    fails(encrypted(world, "mutual_tls"), Code::Unavailable, None).await;
}

async fn token_(world: &World) {
    let token = world.told("/tls/token").to_owned();
    check(encrypted(world, "tls").token_source(move || token.clone())).await;
    for wrong in [encrypted(world, "tls").token("wrong"), encrypted(world, "tls")] {
        fails(wrong, Code::Unauthenticated, Some(ErrorReason::Unauthenticated)).await;
    }
}

#[tokio::test]
async fn token_in_the_clear() {
    for target in ["gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1"]
    {
        let with_token = || Client::builder(target).token("secret");
        assert!(matches!(with_token().build(), Err(Error::Setup(why)) if why.contains("plain text")), "{target}");
        with_token().allow_insecure_token().build().expect("a client");
        with_token().tls().build().expect("a client");
    }
    for target in ["unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1"] {
        Client::builder(target).token("secret").build().expect("a client");
    }
    report::passed("token_in_the_clear");
}

async fn check_resumed(generation: &mut Generation, whole: &v1::CompleteResponse) {
    let answer = generation.result().await.expect("an answer");
    assert!(generation.num_resumes() > 0, "the stream was not broken");
    let told = |answer: &v1::CompleteResponse| {
        (
            answer.choices[0].token_ids.clone(),
            answer.choices[0].text.clone(),
            answer.usage.expect("usage").completion_tokens,
        )
    };
    assert_eq!(told(&answer), told(whole), "the seam shows");
}

async fn drain_and_resume_(world: &World) {
    let whole = world.client().generate(seeded()).result().await.expect("an answer");
    let mut generation = Client::new(world.told("/handover/target")).expect("a client").generate(seeded());
    read_tokens(&mut generation, 1).await;
    let drained = Client::new(world.told("/handover/drained")).expect("a client");
    let grace = Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 });
    let answer = drained.admin().drain(v1::DrainRequest { grace }).await.expect("drains").into_inner();
    assert_eq!((answer.state(), answer.num_requests), (v1::DaemonState::Draining, 1));
    check_resumed(&mut generation, &whole).await;
}

async fn cut_and_resume_(world: &World) {
    let client = world.client();
    let whole = client.generate(seeded()).result().await.expect("an answer");
    let cut = || Client::new(world.told("/cut")).expect("a client");
    let policy = ResumePolicy { max_losses: 64, ..Default::default() };
    check_resumed(&mut cut().generate(seeded()).resume_policy(policy), &whole).await;
    match cut().generate(seeded()).resume(Resume::Never).result().await {
        Err(Error::Lost(lost)) => assert!(lost.started.is_some() && !lost.choices[0].token_ids.is_empty()),
        other => panic!("not lost: {other:?}"),
    }
    wait_free(&client).await;
}

async fn headers_cut_(world: &World) {
    let client = world.client();
    let whole = client.generate(seeded()).result().await.expect("an answer");
    let cut = || Client::new(world.told("/headers_cut")).expect("a client");
    let mut generation = cut().generate(v1::GenerateRequest { request_id: "cut".into(), ..seeded() });
    let answer = generation.result().await.expect("an answer");
    assert_eq!((answer.request_id.as_str(), generation.num_resumes()), ("cut/resume-2", 0));
    assert_eq!(answer.choices[0].token_ids, whole.choices[0].token_ids);
    match cut().generate(seeded()).resume(Resume::Never).result().await {
        Err(Error::Lost(lost)) => panic!("lost in the middle of an answer: {lost:?}"),
        Err(error) => assert!(error.failure().is_some_and(|failure| failure.reason_name.is_empty()), "{error}"),
        Ok(answer) => panic!("not cut: {answer:?}"),
    }
    let drawn = v1::GenerateRequest {
        prompt: Some(hotgraph::text("Once upon a time")),
        max_tokens: Some(4),
        request_id: "drawn".into(),
        ..Default::default()
    };
    let policy = ResumePolicy { max_losses: 1, ..Default::default() };
    let answer = cut().generate(drawn).resume_policy(policy).result().await.expect("an answer");
    assert_eq!(answer.request_id, "drawn/resume-1");
    wait_free(&client).await;
}

async fn soak_(world: &World) {
    async fn call(client: Client) {
        let request = v1::DetokenizeRequest { token_ids: vec![504, 6376], ..Default::default() };
        assert!(!client.inference().detokenize(request).await.expect("text").into_inner().text.is_empty());
    }
    let one = world.client();
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let client = one.clone();
            tokio::spawn(async move {
                for _ in 0..25 {
                    call(client.clone()).await;
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.expect("all succeed");
    }
    for _ in 0..20 {
        call(world.client()).await;
    }
}
