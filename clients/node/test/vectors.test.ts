// The golden wire vectors of tests/contract/vectors.json: this language's read and write them like all others.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import {
  createRegistry,
  type DescMessage,
  equals,
  fromBinary,
  fromJson,
  type JsonValue,
  type Message,
  ScalarType,
  toBinary,
  toJson,
} from "@bufbuild/protobuf";
import * as v1 from "hotgraph-client/v1";

import { addresses, report } from "./report.js";

interface Vector {
  name: string;
  type: string;
  binary: string;
  json: string;
}

/** JSON has no 32-bit floats: 0.1 read from binary is 0.10000000149011612 here. Both are the same field value. */
function withFloats(value: JsonValue): JsonValue {
  if (typeof value === "number") return Number.isSafeInteger(value) ? value : Math.fround(value);
  if (Array.isArray(value)) return value.map(withFloats);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, withFloats(each)]));
}

test("every golden wire vector is read from binary and JSON, and written again as it stands", () => {
  const files = Object.values(v1).filter((each) => typeof each === "object" && "kind" in each && each.kind === "file");
  const registry = createRegistry(...files);
  const path = addresses()?.vectors ?? new URL("../../../tests/contract/vectors.json", import.meta.url);
  const vectors = JSON.parse(readFileSync(path, "utf8")) as Vector[];
  assert.ok(vectors.length >= 60);
  for (const { name, type, binary, json } of vectors) {
    const schema: DescMessage | undefined = registry.getMessage(type);
    assert.ok(schema, name);
    for (const field of schema.fields) {
      // withFloats above would hide a difference of the only other kind of number with a fraction
      assert.ok(field.fieldKind !== "scalar" || field.scalar !== ScalarType.DOUBLE, `${type} has doubles now`);
    }
    const bytes = Buffer.from(binary, "base64");
    const fromBytes: Message = fromBinary(schema, bytes);
    const fromText: Message = fromJson(schema, JSON.parse(json) as JsonValue);
    for (const message of [fromBytes, fromText]) {
      const again: Uint8Array = toBinary(schema, message);
      assert.equal(again.length, bytes.length, name);
      assert.ok(equals(schema, fromBinary(schema, again), fromBytes), name);
      assert.deepEqual(withFloats(toJson(schema, message)), withFloats(JSON.parse(json) as JsonValue), name);
    }
  }
  report("passed vectors");
});
