//! A connection to a daemon, what it was told, and the calls that want more than their stub.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use http::HeaderValue;
use prost::Message;
use ring::digest;
use tonic::{
    IntoRequest, Request,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};
use tonic_health::pb::health_client::HealthClient;

use crate::{
    Error, Generation, Resume, ResumePolicy, Transport,
    target::Target,
    transport::{Shared, Throttle, TokenSource, token_value},
    v1::{
        self, admin_service_client::AdminServiceClient, generate_request::Prompt,
        graph_service_client::GraphServiceClient, inference_service_client::InferenceServiceClient,
    },
};

const MAX_RECEIVE_BYTES: usize = 64 << 20; // a long completion with log-probabilities is larger than gRPC's default of 4 MiB
const MAX_ATTEMPTS: u32 = 5; // as in the languages whose gRPC takes no more
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a daemon. Clones share it; it closes with the last of them and of their calls.
#[derive(Debug, Clone)]
pub struct Client {
    transport: Transport,
    resume: Resume,
    resume_policy: ResumePolicy,
}

/// What a client is told; see [`Client::builder`].
#[must_use]
pub struct Builder {
    target: String,
    tls: Option<ClientTlsConfig>,
    root_certificates: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
    token: Option<TokenSource>,
    fixed_token: Option<String>,
    allow_insecure_token: bool,
    client_id: String,
    max_attempts: u32,
    wait_for_ready: bool,
    keepalive: Duration,
    keepalive_timeout: Duration,
    resume: Resume,
    resume_policy: ResumePolicy,
}

impl Builder {
    /// Encrypts, trusting the system's certificates, or those of [`Builder::root_certificates`].
    pub fn tls(mut self) -> Self {
        self.tls.get_or_insert_default();
        self
    }

    /// Encrypts as tonic's own configuration says.
    pub fn tls_config(mut self, config: ClientTlsConfig) -> Self {
        self.tls = Some(config);
        self
    }

    /// Encrypts, trusting the certificates of this PEM file instead of the system's.
    pub fn root_certificates(mut self, pem: impl Into<PathBuf>) -> Self {
        self.root_certificates = Some(pem.into());
        self.tls()
    }

    /// Mutual TLS: shows the certificate of one PEM file, whose key is in the other.
    pub fn identity(mut self, certificate_chain: impl Into<PathBuf>, private_key: impl Into<PathBuf>) -> Self {
        self.identity = Some((certificate_chain.into(), private_key.into()));
        self.tls()
    }

    /// Sends `authorization: bearer TOKEN` with every call. Over plain TCP to another host it is refused.
    pub fn token(mut self, token: impl Into<String>) -> Self {
        let token = token.into();
        self.fixed_token = Some(token.clone());
        self.token = Some(std::sync::Arc::new(move || token.clone()));
        self
    }

    /// Asks for the token before each call.
    pub fn token_source(mut self, source: impl Fn() -> String + Send + Sync + 'static) -> Self {
        self.fixed_token = None;
        self.token = Some(std::sync::Arc::new(source));
        self
    }

    /// Lets a token go over plain TCP to another host, for a path that is safe by other means.
    pub fn allow_insecure_token(mut self) -> Self {
        self.allow_insecure_token = true;
        self
    }

    /// Names the caller to the daemon: AdminService.ListClients shows it.
    pub fn client_id(mut self, id: impl Into<String>) -> Self {
        self.client_id = id.into();
        self
    }

    /// Bounds how often a call is sent that was not answered yet, 1 to 5 in all; 4 by default.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// Lets calls wait for a server, up to their deadline, instead of failing when there is none.
    pub fn wait_for_ready(mut self) -> Self {
        self.wait_for_ready = true;
        self
    }

    /// Pings after so much silence during calls (10 s); a server that does not answer in time (5 s) is dead.
    pub fn keepalive(mut self, silence: Duration, timeout: Duration) -> Self {
        (self.keepalive, self.keepalive_timeout) = (silence, timeout);
        self
    }

    /// What [`Client::generate`] does when its server is lost; [`Resume::Repeatable`] by default.
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = resume;
        self
    }

    /// How far [`Client::generate`] goes after a lost server.
    pub fn resume_policy(mut self, policy: ResumePolicy) -> Self {
        self.resume_policy = policy;
        self
    }

    /// The client; it connects with the first call. Fails with [`Error::Setup`] for what cannot work or is not safe, and
    /// outside of a tokio runtime.
    pub fn build(self) -> Result<Client, Error> {
        let target = Target::parse(&self.target)?;
        if !(1..=MAX_ATTEMPTS).contains(&self.max_attempts) {
            return setup(format!("attempts must be 1 to {MAX_ATTEMPTS}, not {}", self.max_attempts));
        }
        if self.keepalive.is_zero() || self.keepalive_timeout.is_zero() {
            return setup("keepalive and its timeout must be positive");
        }
        if self.token.is_some() && self.tls.is_none() && !self.allow_insecure_token && !target.is_local() {
            return setup(format!(
                "a token would go to {} in plain text: use TLS, or allow_insecure_token when the path is safe",
                self.target
            ));
        }
        if let Some(token) = &self.fixed_token {
            token_value(token).map_err(|status| Error::Setup(status.message().to_owned()))?;
        }
        if tokio::runtime::Handle::try_current().is_err() {
            return setup("a client is made within a tokio runtime");
        }
        let client_id = match self.client_id.as_str() {
            "" => None,
            id => Some(
                HeaderValue::from_str(id).or_else(|_| setup("the client id has characters that no header may hold"))?,
            ),
        };
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", target.authority()))
            .and_then(|endpoint| endpoint.user_agent(concat!("hotgraph-rust/", env!("CARGO_PKG_VERSION"))))
            .map_err(|error| Error::Setup(format!("{}: {error}", self.target)))?
            .http2_keep_alive_interval(self.keepalive)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(false);
        if let Some(mut tls) = self.tls {
            tls = tls.timeout(CONNECT_TIMEOUT);
            tls = match &self.root_certificates {
                Some(path) => tls.ca_certificate(Certificate::from_pem(read(path)?)),
                None => tls.with_native_roots(),
            };
            if let Some((chain, key)) = &self.identity {
                tls = tls.identity(Identity::from_pem(read(chain)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(|error| Error::Setup(format!("TLS: {error:?}")))?;
        }
        let channel = endpoint.connect_with_connector_lazy(Connector(target));
        let shared = Shared {
            token: self.token,
            client_id,
            max_attempts: self.max_attempts,
            wait_for_ready: self.wait_for_ready,
            throttle: Throttle::new(),
        };
        Ok(Client {
            transport: Transport::new(channel, shared),
            resume: self.resume,
            resume_policy: self.resume_policy,
        })
    }
}

fn setup<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::Setup(message.into()))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).or_else(|error| setup(format!("{}: {error}", path.display())))
}

struct Connector(Target);

impl tower_service::Service<http::Uri> for Connector {
    type Response = hyper_util::rt::TokioIo<crate::target::Connection>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let target = self.0.clone();
        Box::pin(async move { target.connect(CONNECT_TIMEOUT).await })
    }
}

impl Client {
    /// A client that is told nothing but the target: `unix:PATH`, `HOST:PORT`, or `ipv4:HOST:PORT,HOST:PORT` for several
    /// servers, of which the first that answers is used. See [`Builder::build`].
    pub fn new(target: &str) -> Result<Self, Error> {
        Self::builder(target).build()
    }

    /// What a client can be told.
    pub fn builder(target: impl Into<String>) -> Builder {
        Builder {
            target: target.into(),
            tls: None,
            root_certificates: None,
            identity: None,
            token: None,
            fixed_token: None,
            allow_insecure_token: false,
            client_id: String::new(),
            max_attempts: 4,
            wait_for_ready: false,
            keepalive: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            resume: Resume::default(),
            resume_policy: ResumePolicy::default(),
        }
    }

    /// What the stubs are made of, for services that this crate does not know.
    pub fn transport(&self) -> Transport {
        self.transport.clone()
    }

    /// The stub of generation, tokens and models. Errors of stubs are statuses: [`Error::from`] reads them.
    pub fn inference(&self) -> InferenceServiceClient<Transport> {
        InferenceServiceClient::new(self.transport()).max_decoding_message_size(MAX_RECEIVE_BYTES)
    }

    /// The stub of the graph cache.
    pub fn graphs(&self) -> GraphServiceClient<Transport> {
        GraphServiceClient::new(self.transport()).max_decoding_message_size(MAX_RECEIVE_BYTES)
    }

    /// The stub of running the daemon.
    pub fn admin(&self) -> AdminServiceClient<Transport> {
        AdminServiceClient::new(self.transport()).max_decoding_message_size(MAX_RECEIVE_BYTES)
    }

    /// The stub of gRPC's health.
    pub fn health(&self) -> HealthClient<Transport> {
        HealthClient::new(self.transport())
    }

    /// A generation; it starts when it is first read. Dropping it ends the call, and the server frees its place at the next
    /// step.
    pub fn generate(&self, request: v1::GenerateRequest) -> Generation {
        Generation::new(self.inference(), request, self.resume, self.resume_policy)
    }

    /// Generates and answers once, with all of it: one unary call, sent again when the server is not reached.
    /// `generate(request).result()` goes on after a lost server as well. A `tonic::Request` takes a timeout.
    pub async fn complete(
        &self,
        request: impl IntoRequest<v1::GenerateRequest>,
    ) -> Result<v1::CompleteResponse, Error> {
        let (metadata, extensions, message) = request.into_request().into_parts();
        let key = session_value(&message.session_key);
        // The same, field by field.
        let unary = v1::CompleteRequest::decode(message.encode_to_vec().as_slice())
            .map_err(|error| Error::Setup(format!("not to be sent: {error}")))?;
        let mut request = Request::from_parts(metadata, extensions, unary);
        if let Some(key) = key {
            request.metadata_mut().insert("session_id", key);
        }
        Ok(self.inference().complete(request).await?.into_inner())
    }

    /// The models that can be asked for, of all pages.
    pub async fn all_models(&self) -> Result<Vec<v1::Model>, Error> {
        let mut request = v1::ListModelsRequest::default();
        let mut found = Vec::new();
        loop {
            let page = self.inference().list_models(request.clone()).await?.into_inner();
            found.extend(page.models);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// The entries of the graph cache in one of the states, or all, most hits first, of all pages. The request's page size is
    /// how many come at once.
    pub async fn all_graphs(&self, mut request: v1::ListGraphsRequest) -> Result<Vec<v1::Graph>, Error> {
        let mut found = Vec::new();
        loop {
            let page = self.graphs().list_graphs(request.clone()).await?.into_inner();
            found.extend(page.graphs);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Those who called since the daemon's start, of all pages.
    pub async fn all_clients(&self) -> Result<Vec<v1::Client>, Error> {
        let mut request = v1::ListClientsRequest { page_size: 1000, ..Default::default() };
        let mut found = Vec::new();
        loop {
            let page = self.admin().list_clients(request.clone()).await?.into_inner();
            found.extend(page.clients);
            if page.next_page_token.is_empty() {
                return Ok(found);
            }
            request.page_token = page.next_page_token;
        }
    }
}

/// The metadata that a balancer hashes; a key that no header may hold goes as its SHA-256.
pub(crate) fn session_value(key: &str) -> Option<MetadataValue<Ascii>> {
    let is_plain = key.trim() == key && key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    let text = if is_plain {
        key.to_owned()
    } else {
        digest::digest(&digest::SHA256, key.as_bytes()).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    };
    if key.is_empty() { None } else { text.parse().ok() } // either text is a header's
}

/// A prompt to continue.
pub fn text(text: impl Into<String>) -> Prompt {
    Prompt::Text(text.into())
}

/// A prompt of token ids, taken as they are.
pub fn token_ids(ids: impl Into<Vec<u32>>) -> Prompt {
    Prompt::TokenIds(v1::TokenIds { ids: ids.into() })
}

/// A conversation, oldest turn first.
pub fn chat(messages: impl IntoIterator<Item = v1::ChatMessage>) -> Prompt {
    Prompt::Chat(v1::ChatPrompt { messages: messages.into_iter().collect(), add_generation_prompt: None })
}

/// A turn with instructions for the whole conversation.
pub fn system(text: impl Into<String>) -> v1::ChatMessage {
    turn(v1::ChatRole::System, text)
}

/// A turn of who asks.
pub fn user(text: impl Into<String>) -> v1::ChatMessage {
    turn(v1::ChatRole::User, text)
}

/// A turn of the model.
pub fn assistant(text: impl Into<String>) -> v1::ChatMessage {
    turn(v1::ChatRole::Assistant, text)
}

fn turn(role: v1::ChatRole, text: impl Into<String>) -> v1::ChatMessage {
    v1::ChatMessage { role: role.into(), content: text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_keys_are_headers() {
        assert_eq!(session_value(""), None);
        assert_eq!(session_value("a key").expect("a header"), "a key");
        for strange in ["ключ", " a", "a\n", "\u{7f}"] {
            let value = session_value(strange).expect("a header");
            assert_eq!(value.len(), 64, "{strange:?}");
        }
        // SHA-256 of the two bytes of U+00E9, by another library.
        let known = "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c";
        assert_eq!(session_value("é").expect("a header"), known);
    }

    #[test]
    fn a_client_is_made_within_a_runtime() {
        assert!(matches!(Client::new("unix:s"), Err(Error::Setup(_))));
    }
}
