//! Calls a hotgraph daemon: the stubs of the contract ([`v1`]) and what a caller wants on top of them. A connection by Unix
//! socket or TCP, TLS and tokens; typed errors; retries; and streams that go on after a lost server.
//!
//! ```no_run
//! use hotgraph::{Client, v1};
//!
//! # async fn example() -> Result<(), hotgraph::Error> {
//! let client = Client::new("unix:hotgraph.sock")?;
//! let mut generation = client.generate(v1::GenerateRequest {
//!     prompt: Some(hotgraph::chat([hotgraph::user("What is the capital of France?")])),
//!     max_tokens: Some(40),
//!     ..Default::default()
//! });
//! while let Some(text) = generation.next_text().await {
//!     print!("{}", text?);
//! }
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod client;
mod error;
mod generation;
#[cfg(feature = "json")]
pub mod json;
mod progress;
mod target;
mod transport;

pub use client::{Builder, Client, assistant, chat, system, text, token_ids, user};
pub use error::{Error, Failure, Lost, Resource, Violation};
pub use generation::Generation;
pub use progress::{Resume, ResumePolicy};
pub use transport::Transport;

pub use prost_types;
pub use tonic;

/// Messages and stubs of `hotgraph.v1`, as generated.
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod v1 {
    include!("v1/hotgraph.v1.rs");
}

/// Messages and stub of gRPC's own health service.
pub use tonic_health::pb as health;

/// Where the daemon listens when it is told nothing.
pub const DEFAULT_TARGET: &str = "unix:hotgraph.sock";
