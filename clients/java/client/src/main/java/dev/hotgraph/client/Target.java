package dev.hotgraph.client;

import java.net.InetAddress;
import java.net.URI;
import java.net.URISyntaxException;
import java.net.UnknownHostException;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.regex.Pattern;

/** What a target is, judged from its text: where to connect, and whether that is this host. It connects to nothing. */
final class Target {
    private static final String UNIX = "unix:";
    private static final Pattern LOOPBACK_IPV4 =
            Pattern.compile("127(\\.(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])){3}");
    private static final Pattern SCHEME = Pattern.compile("^(dns|ipv4|ipv6):(///)?");

    private Target() {}

    /** Whether it is a Unix socket. */
    static boolean isUnix(String target) {
        return target.startsWith(UNIX);
    }

    /** As gRPC for Java takes it: the path of a Unix socket absolute and escaped, all else as it is. */
    static String forGrpc(String target) {
        if (!isUnix(target)) {
            return target;
        }
        String path = target.substring(UNIX.length());
        if (path.startsWith("//")) {
            path = path.substring(2); // unix:///PATH
        }
        if (path.isEmpty()) {
            throw new IllegalArgumentException("the target names no Unix socket: " + target);
        }
        try {
            return new URI("unix", null, Path.of(path).toAbsolutePath().toString(), null).toString();
        } catch (URISyntaxException cannotBe) {
            throw new IllegalArgumentException("not a path: " + path, cannotBe);
        }
    }

    /** Whether every address of it is a Unix socket or this host's loopback. */
    static boolean isLocal(String target) {
        if (isUnix(target)) {
            return true;
        }
        String addresses = SCHEME.matcher(target).replaceFirst("");
        return Arrays.stream(addresses.split(",", -1)).allMatch(address -> isLoopback(hostOf(address)));
    }

    /** HOST of HOST:PORT, [HOST]:PORT or HOST. */
    static String hostOf(String address) {
        if (address.startsWith("[")) {
            int end = address.indexOf(']');
            return end < 0 ? address : address.substring(1, end);
        }
        int colon = address.indexOf(':');
        boolean hasPort = colon >= 0 && colon == address.lastIndexOf(':'); // more of them: IPv6 without a port
        return hasPort ? address.substring(0, colon) : address;
    }

    private static boolean isLoopback(String host) {
        if (host.equals("localhost") || LOOPBACK_IPV4.matcher(host).matches()) {
            return true;
        }
        if (host.indexOf(':') < 0) {
            return false; // a name: who knows where it leads
        }
        try {
            return InetAddress.getByName(host).isLoopbackAddress(); // IPv6 is read, never looked up
        } catch (UnknownHostException noAddress) {
            return false;
        }
    }
}
