package dev.hotgraph.client;

import io.grpc.EquivalentAddressGroup;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.StatusOr;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.UnknownHostException;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Resolves {@code ipv4:HOST:PORT,HOST:PORT} and {@code ipv6:[HOST]:PORT,...}, which other gRPC libraries know and
 * Java's does not: several servers, of which the first that answers is used. gRPC finds the two providers as services.
 */
public abstract class AddressList extends NameResolverProvider {
    private static final int PRIORITY = 4; // below 5, gRPC's own: should it learn the scheme, its resolver is taken

    private final String scheme;
    private final Pattern address;

    /** Of IPv4 addresses. */
    public static final class Ipv4 extends AddressList {
        /** For gRPC. */
        public Ipv4() {
            super("ipv4", Pattern.compile("([0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+):([0-9]{1,5})"));
        }
    }

    /** Of IPv6 addresses. */
    public static final class Ipv6 extends AddressList {
        /** For gRPC. */
        public Ipv6() {
            super("ipv6", Pattern.compile("\\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\\]:([0-9]{1,5})"));
        }
    }

    private AddressList(String scheme, Pattern address) {
        this.scheme = scheme;
        this.address = address;
    }

    @Override
    protected boolean isAvailable() {
        return true;
    }

    @Override
    protected int priority() {
        return PRIORITY;
    }

    @Override
    public String getDefaultScheme() {
        return scheme;
    }

    /** Throws IllegalArgumentException for what is no such list. */
    @Override
    public NameResolver newNameResolver(URI target, NameResolver.Args arguments) {
        if (!scheme.equals(target.getScheme())) {
            return null;
        }
        String list = target.getSchemeSpecificPart().replaceFirst("^///", "");
        List<EquivalentAddressGroup> found = new ArrayList<>();
        for (String text : list.split(",", -1)) {
            found.add(new EquivalentAddressGroup(parsed(text)));
        }
        return new Fixed(list.split(",", 2)[0], List.copyOf(found));
    }

    private InetSocketAddress parsed(String text) {
        Matcher parts = address.matcher(text);
        if (!parts.matches()) {
            throw new IllegalArgumentException(scheme + ": is no such address: " + text);
        }
        try {
            return new InetSocketAddress(InetAddress.getByName(parts.group(1)), Integer.parseInt(parts.group(2)));
        } catch (UnknownHostException noAddress) {
            throw new IllegalArgumentException(scheme + ": is no such address: " + text, noAddress);
        }
    }

    private static final class Fixed extends NameResolver {
        private final String authority;
        private final List<EquivalentAddressGroup> addresses;

        Fixed(String authority, List<EquivalentAddressGroup> addresses) {
            this.authority = authority;
            this.addresses = addresses;
        }

        @Override
        public String getServiceAuthority() {
            return authority;
        }

        @Override
        public void start(Listener2 listener) {
            listener.onResult(ResolutionResult.newBuilder()
                    .setAddressesOrError(StatusOr.fromValue(addresses))
                    .build());
        }

        @Override
        public void shutdown() {
            // It holds nothing.
        }
    }
}
