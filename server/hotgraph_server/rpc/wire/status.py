"""The daemon's status and its clients on the wire."""

from __future__ import annotations

from typing import Final

from graphcache import CacheStats
from hotgraph.v1 import admin_service_pb2
from hotgraph_server.rpc.clients import Client
from hotgraph_server.rpc.lifecycle import DaemonState
from hotgraph_server.rpc.wire.common import to_timestamp
from hotgraph_server.scheduler import KvCacheStatus, SchedulerStatus

STATES: Final = {
    DaemonState.STARTING: admin_service_pb2.DAEMON_STATE_STARTING,
    DaemonState.SERVING: admin_service_pb2.DAEMON_STATE_SERVING,
    DaemonState.DRAINING: admin_service_pb2.DAEMON_STATE_DRAINING,
    DaemonState.STOPPED: admin_service_pb2.DAEMON_STATE_STOPPED,
}


def scheduler_message(status: SchedulerStatus) -> admin_service_pb2.SchedulerStatus:
    return admin_service_pb2.SchedulerStatus(
        num_slots=status.num_slots,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        max_waiting=status.max_waiting,
        num_steps=status.num_steps,
        num_requests=status.num_requests,
        num_finished=status.num_finished,
        num_cancelled=status.num_cancelled,
        num_expired=status.num_expired,
        num_failed=status.num_failed,
        num_rejected=status.num_rejected,
        num_preemptions=status.num_preemptions,
        num_prompt_tokens=status.num_prompt_tokens,
        num_completion_tokens=status.num_completion_tokens,
    )


def kv_cache_message(status: KvCacheStatus) -> admin_service_pb2.KvCacheStatus:
    return admin_service_pb2.KvCacheStatus(
        block_size=status.block_size,
        num_blocks=status.num_blocks,
        num_free_blocks=status.num_free_blocks,
        num_cached_blocks=status.num_cached_blocks,
        num_used_blocks=status.num_used_blocks,
        size_bytes=status.size_bytes,
        num_cached_tokens=status.num_cached_tokens,
    )


def graph_cache_message(stats: CacheStats) -> admin_service_pb2.GraphCacheStatus:
    return admin_service_pb2.GraphCacheStatus(
        backend=stats.backend,
        num_ready=stats.num_ready,
        num_pending=stats.num_pending,
        num_hits=stats.num_hits,
        num_misses=stats.num_misses,
        num_captures=stats.num_captures,
        num_evictions=stats.num_evictions,
        num_failures=stats.num_failures,
        used_bytes=stats.used_bytes,
        limit_bytes=stats.limit_bytes,
    )


def client_message(client: Client) -> admin_service_pb2.Client:
    return admin_service_pb2.Client(
        name=f"clients/{client.name}",
        peer=client.peer,
        user_agent=client.user_agent,
        identity=client.proven,
        num_active_requests=client.num_active_requests,
        num_requests=client.num_requests,
        num_prompt_tokens=client.num_prompt_tokens,
        num_completion_tokens=client.num_completion_tokens,
        first_seen_time=to_timestamp(client.first_seen_time),
        last_seen_time=to_timestamp(client.last_seen_time),
    )
