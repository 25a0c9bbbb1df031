// @ts-check
// A conversation with the model in the terminal: one line is one turn, Ctrl-C stops an answer, Ctrl-D ends it.
//
//     node examples/chat/main.js --target unix:hotgraph.sock

import { createInterface } from "node:readline";
import { parseArgs } from "node:util";

import { assistant, chat, Client, DEFAULT_TARGET, HotgraphError, system, tlsFromFiles, user } from "hotgraph-client";

const { values } = parseArgs({
  options: {
    target: { type: "string", default: DEFAULT_TARGET }, // unix:PATH or HOST:PORT
    system: { type: "string", default: "You are a helpful assistant." },
    temperature: { type: "string", default: "0.7" }, // 0 is greedy
    "max-tokens": { type: "string", default: "256" }, // of an answer
    seed: { type: "string" }, // drawn by the server
    "tls-roots": { type: "string" }, // PEM file of the certificates to trust; turns TLS on
    "tls-certificate": { type: "string" }, // PEM files of the client's, for mutual TLS
    "tls-key": { type: "string" },
  },
});

const roots = values["tls-roots"];
const client = new Client(values.target, {
  token: process.env["HOTGRAPH_TOKEN"],
  tls: roots && tlsFromFiles({
    rootCertificates: roots,
    certificateChain: values["tls-certificate"],
    privateKey: values["tls-key"],
  }) || undefined,
});
const sampling = {
  temperature: Number(values.temperature),
  ...(values.seed === undefined ? {} : { seed: BigInt(values.seed) }),
};

/** @type {AbortController | undefined} */
let answering;
const lines = createInterface({ input: process.stdin, output: process.stdout, prompt: "> " });
lines.on("SIGINT", () => (answering ? answering.abort() : lines.close()));

const messages = [system(values.system)];
lines.prompt();
try {
  for await (const line of lines) {
    if (line.trim()) {
      messages.push(user(line.trim()));
      answering = new AbortController();
      const request = { prompt: chat(...messages), sampling, maxTokens: Number(values["max-tokens"]) };
      const generation = client.generate(request, { signal: answering.signal });
      try {
        for await (const piece of generation.texts()) process.stdout.write(piece);
      } catch (error) {
        if (!(error instanceof HotgraphError && error.kind === "cancelled")) throw error;
      }
      answering = undefined;
      messages.push(assistant(generation.text));
      process.stdout.write("\n");
    }
    lines.prompt();
  }
} catch (error) {
  console.error(error instanceof HotgraphError ? error.message : error);
  process.exitCode = 1;
} finally {
  lines.close();
  client.close();
}
