//! A conversation with the model in the terminal: one line is one turn, Ctrl-C stops an answer, Ctrl-D ends it.
//!
//! `cargo run --example chat -- unix:hotgraph.sock` (HOST:PORT with HOTGRAPH_ROOTS, a PEM file, for TLS; HOTGRAPH_TOKEN).

use std::{
    env,
    error::Error,
    io::{BufRead, Write, stdin, stdout},
};

use hotgraph::{Client, v1};
use tokio::signal::ctrl_c;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let target = env::args().nth(1).unwrap_or_else(|| hotgraph::DEFAULT_TARGET.into());
    let mut builder = Client::builder(target);
    if let Some(roots) = env::var_os("HOTGRAPH_ROOTS") {
        builder = builder.root_certificates(roots);
    }
    if let Ok(token) = env::var("HOTGRAPH_TOKEN") {
        builder = builder.token(token);
    }
    let client = builder.build()?;
    let mut messages = vec![hotgraph::system("You are a helpful assistant.")];
    loop {
        print!("> ");
        stdout().flush()?;
        let mut line = String::new();
        if stdin().lock().read_line(&mut line)? == 0 {
            println!();
            return Ok(());
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(hotgraph::user(line.trim()));
        let answer = say(&client, &messages).await?;
        messages.push(hotgraph::assistant(answer));
    }
}

/// Prints one answer as it comes. An interrupt leaves it at what there is.
async fn say(client: &Client, messages: &[v1::ChatMessage]) -> Result<String, Box<dyn Error>> {
    let mut generation = client.generate(v1::GenerateRequest {
        prompt: Some(hotgraph::chat(messages.iter().cloned())),
        sampling: Some(v1::SamplingParams { temperature: Some(0.7), ..Default::default() }),
        max_tokens: Some(256),
        ..Default::default()
    });
    loop {
        tokio::select! {
            text = generation.next_text() => match text {
                Some(text) => print!("{}", text?),
                None => break,
            },
            interrupted = ctrl_c() => {
                interrupted?;
                generation.close();
                break;
            }
        }
        stdout().flush()?;
    }
    println!();
    Ok(generation.text().to_owned())
}
