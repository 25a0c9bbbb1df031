// The contract hotgraph.v1: messages, enums and services, generated from protos/.
export * from "./gen/hotgraph/v1/admin_service_pb.js";
export * from "./gen/hotgraph/v1/error_reason_pb.js";
export * from "./gen/hotgraph/v1/generation_pb.js";
export * from "./gen/hotgraph/v1/graph_pb.js";
export * from "./gen/hotgraph/v1/graph_service_pb.js";
export * from "./gen/hotgraph/v1/inference_service_pb.js";
export * from "./gen/hotgraph/v1/model_pb.js";
