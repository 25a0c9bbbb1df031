// The Node client of hotgraph. Messages and enums of the contract are in "hotgraph-client/v1".

export { durationFromMs, durationMs, timestampDate } from "@bufbuild/protobuf/wkt";
export { status as Code } from "@grpc/grpc-js";

export { assistant, chat, Client, system, text, tokenIds, user } from "./client.js";
export {
  type ErrorDetails,
  type ErrorKind,
  fromError,
  HotgraphError,
  type Resource,
  StreamLostError,
  type Violation,
} from "./errors.js";
export { HealthCheckResponse_ServingStatus as ServingStatus } from "./gen/grpc_health/v1/health_pb.js";
export { type GenerateInit, type GenerateOptions, Generation } from "./generation.js";
export { type ClientOptions, DEFAULT_TARGET, type TlsConfig, tlsFromFiles, type Token, VERSION } from "./options.js";
export { DEFAULT_RESUME_POLICY, type GenerationEvent, type Resume, type ResumePolicy } from "./progress.js";
export { type CallOptions, type Stub } from "./stub.js";
