// What a target is, judged from its text: whether it is this host. It connects to nothing.

import { isIP } from "node:net";

/** Whether every address of the target is a Unix socket or this host's loopback. */
export function isLocal(target: string): boolean {
  if (/^unix(-abstract)?:/.test(target)) return true;
  const addresses = target.replace(/^(dns|ipv4|ipv6):/, "").replace(/^\/\/\//, "");
  return addresses.split(",").every((address) => isLoopback(hostOf(address)));
}

function hostOf(address: string): string {
  if (address.startsWith("[")) return address.slice(1).split("]")[0]!;
  return /^[^:]*:[^:]*$/.test(address) ? address.split(":")[0]! : address;
}

function isLoopback(host: string): boolean {
  switch (isIP(host)) {
    case 4:
      return host.startsWith("127.");
    case 6:
      return /^(0*:)+0*1$/.test(host);
    default:
      return host === "localhost";
  }
}
