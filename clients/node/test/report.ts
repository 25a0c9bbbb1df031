// What the tests find of the daemons that tests/interop started, and what they tell it.

import { appendFileSync, readFileSync } from "node:fs";

export interface Addresses {
  model: string;
  unix: string;
  tcp: string;
  tls: { target: string; root_certificates: string; token: string };
  mutual_tls: { target: string; root_certificates: string; certificate_chain: string; private_key: string };
  handover: { target: string; drained: string };
  cut: string;
  headers_cut: string;
  vectors: string;
}

/** Undefined when nobody started any. */
export function addresses(): Addresses | undefined {
  const path = process.env["HOTGRAPH_INTEROP"];
  return path === undefined ? undefined : (JSON.parse(readFileSync(path, "utf8")) as Addresses);
}

export function report(line: string): void {
  const path = process.env["HOTGRAPH_INTEROP_REPORT"];
  if (path !== undefined) appendFileSync(path, line + "\n");
}
