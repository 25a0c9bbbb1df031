// What a client is told about its connection, and gRPC's settings for it. It opens none.

import { readFileSync } from "node:fs";

import { type ChannelCredentials, type ChannelOptions, credentials } from "@grpc/grpc-js";

import { type Resume, type ResumePolicy } from "./progress.js";
import { isLocal } from "./target.js";

/** Where the daemon listens when it is told nothing. */
export const DEFAULT_TARGET = "unix:hotgraph.sock";

/** That of this package; the user agent tells it. */
export const VERSION = "0.1.0";

const MAX_RECEIVE_BYTES = 64 << 20; // a long completion with log-probabilities is larger than gRPC's default of 4 MiB
const MAX_ATTEMPTS = 5; // gRPC takes no more
const RETRY_FIRST_BACKOFF = "0.1s";
const RETRY_MAX_BACKOFF = "2s";

/** PEM. Without root certificates the system's are trusted; key and chain (both or none) are for mutual TLS. */
export interface TlsConfig {
  readonly rootCertificates?: Uint8Array | string | undefined;
  readonly certificateChain?: Uint8Array | string | undefined;
  readonly privateKey?: Uint8Array | string | undefined;
  /** The name in the server's certificate, when the target has another. */
  readonly serverName?: string | undefined;
}

/** The same, read from PEM files. Throws when one cannot be read. */
export function tlsFromFiles(paths: {
  rootCertificates?: string | undefined;
  certificateChain?: string | undefined;
  privateKey?: string | undefined;
  serverName?: string | undefined;
}): TlsConfig {
  const read = (path: string | undefined): Uint8Array | undefined => (path === undefined ? undefined : readFileSync(path));
  return {
    rootCertificates: read(paths.rootCertificates),
    certificateChain: read(paths.certificateChain),
    privateKey: read(paths.privateKey),
    serverName: paths.serverName,
  };
}

/** A token, or what is asked for it before each call. */
export type Token = string | (() => string | Promise<string>);

export interface ClientOptions {
  /** Sent as `authorization: bearer ...`. Over plain TCP to another host it is refused, unless allowInsecureToken. */
  readonly token?: Token | undefined;
  /** true for the system's root certificates, or a TlsConfig, also for mutual TLS. */
  readonly tls?: boolean | TlsConfig | undefined;
  /** Of each call that names none, in milliseconds. Default: no limit but the server's. Watches have none of it. */
  readonly timeoutMs?: number | undefined;
  /** Of each call in all, 1 to 5, by gRPC's retries. Default: 4. */
  readonly maxAttempts?: number | undefined;
  /** Calls wait for a server, up to their deadline, instead of failing at once when there is none. */
  readonly waitForReady?: boolean | undefined;
  /** Whether generations go on after a lost server. Default: "repeatable". */
  readonly resume?: Resume | undefined;
  /** How far they go. */
  readonly resumePolicy?: Partial<ResumePolicy> | undefined;
  /** A ping after so much silence during calls, default 10 s; the daemon allows one each 5 s. */
  readonly keepaliveMs?: number | undefined;
  /** A server that does not answer the ping in time is dead. Default: 5 s. */
  readonly keepaliveTimeoutMs?: number | undefined;
  /** Names the caller to the daemon: AdminService.ListClients shows it. */
  readonly clientId?: string | undefined;
  /** Lets a token go over plain TCP to another host, for a path that is safe by other means. */
  readonly allowInsecureToken?: boolean | undefined;
  /** gRPC channel options; they win over ours. */
  readonly channelOptions?: ChannelOptions | undefined;
}

/** Throws RangeError for a time limit that is not a positive number. */
export function checkTimeout(timeoutMs: number | undefined): void {
  if (timeoutMs !== undefined && !(timeoutMs > 0 && Number.isFinite(timeoutMs))) {
    throw new RangeError(`a timeout must be a positive number of milliseconds, not ${timeoutMs}`);
  }
}

/** Throws for what cannot work or is not safe. */
export function checkOptions(target: string, options: ClientOptions): void {
  const { maxAttempts = 4, keepaliveMs = 1, keepaliveTimeoutMs = 1, tls } = options;
  if (!target) throw new RangeError("the target is empty");
  checkTimeout(options.timeoutMs);
  if (!(Number.isInteger(maxAttempts) && maxAttempts >= 1 && maxAttempts <= MAX_ATTEMPTS)) {
    throw new RangeError(`maxAttempts must be 1 to ${MAX_ATTEMPTS}, not ${maxAttempts}`);
  }
  if (!(keepaliveMs > 0 && keepaliveTimeoutMs > 0)) {
    throw new RangeError("keepaliveMs and keepaliveTimeoutMs must be positive");
  }
  if (typeof tls === "object" && (tls.privateKey === undefined) !== (tls.certificateChain === undefined)) {
    throw new RangeError("mutual TLS needs both privateKey and certificateChain");
  }
  if (options.token !== undefined && !tls && !options.allowInsecureToken && !isLocal(target)) {
    throw new RangeError(
      `a token would go to ${target} in plain text: use tls, or allowInsecureToken when the path is safe`,
    );
  }
}

export function channelCredentials(tls: boolean | TlsConfig | undefined): ChannelCredentials {
  if (!tls) return credentials.createInsecure();
  if (tls === true) return credentials.createSsl();
  const pem = (part: Uint8Array | string | undefined): Buffer | null => (part === undefined ? null : Buffer.from(part));
  return credentials.createSsl(pem(tls.rootCertificates), pem(tls.privateKey), pem(tls.certificateChain));
}

export function channelOptions(target: string, options: ClientOptions): ChannelOptions {
  const { tls } = options;
  return {
    "grpc.primary_user_agent": `hotgraph-node/${VERSION}`,
    "grpc.service_config": serviceConfig(options.maxAttempts ?? 4),
    "grpc.service_config_disable_resolution": 1,
    "grpc.use_local_subchannel_pool": 1, // a connection of its own: gRPC would share those of like channels
    "grpc.max_receive_message_length": MAX_RECEIVE_BYTES,
    "grpc.keepalive_time_ms": options.keepaliveMs ?? 10_000,
    "grpc.keepalive_timeout_ms": options.keepaliveTimeoutMs ?? 5000,
    "grpc.keepalive_permit_without_calls": 0,
    // A restarted daemon is found again soon.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2000,
    ...(isLocal(target) ? { "grpc.enable_http_proxy": 0 } : {}),
    ...(typeof tls === "object" && tls.serverName !== undefined
      ? { "grpc.ssl_target_name_override": tls.serverName, "grpc.default_authority": tls.serverName }
      : {}),
    ...options.channelOptions,
  };
}

/**
 * Tells gRPC which calls it tries again by itself: UNAVAILABLE and RESOURCE_EXHAUSTED, up to maxAttempts in all, as long as
 * nothing was answered. It waits as long as the server's push-back says, else 0.1 s, 0.2 s, 0.4 s with jitter. Throttling: each
 * failure takes one of 20 tokens and each success gives back a fifth of one; at half or less nothing is tried again. EvictGraph
 * is never tried again: a second time it would fail although the first one worked.
 */
export function serviceConfig(maxAttempts: number): string {
  const retryPolicy = {
    maxAttempts,
    initialBackoff: RETRY_FIRST_BACKOFF,
    maxBackoff: RETRY_MAX_BACKOFF,
    backoffMultiplier: 2,
    retryableStatusCodes: ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
  };
  return JSON.stringify({
    loadBalancingConfig: [], // gRPC for Node wants it, and takes the first that answers
    methodConfig: [
      { name: [{}], ...(maxAttempts > 1 ? { retryPolicy } : {}) }, // gRPC refuses a policy of one attempt
      { name: [{ service: "hotgraph.v1.GraphService", method: "EvictGraph" }] },
    ],
    retryThrottling: { maxTokens: 20, tokenRatio: 0.2 },
  });
}
