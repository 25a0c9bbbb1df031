package hotgraph

// What a target is, judged from its text: where to connect, and whether that is this host. It connects to nothing.

import (
	"errors"
	"net"
	"net/netip"
	"strings"

	"google.golang.org/grpc/resolver"
)

// isLocal tells whether every address of the target is a Unix socket or this host's loopback.
func isLocal(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	addresses := target
	for _, prefix := range []string{"dns:", "ipv4:", "ipv6:", "passthrough:"} {
		addresses = strings.TrimPrefix(addresses, prefix)
	}
	addresses = strings.TrimPrefix(addresses, "///")
	for _, address := range strings.Split(addresses, ",") {
		if !isLoopback(hostOf(address)) {
			return false
		}
	}
	return true
}

func hostOf(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return strings.Trim(address, "[]")
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// addressList resolves ipv4:HOST:PORT,HOST:PORT and ipv6:[HOST]:PORT,..., which other gRPC libraries know and Go's does not:
// several servers, of which the first that answers is used.
type addressList struct{ scheme string }

func (a addressList) Scheme() string { return a.scheme }

func (a addressList) Build(target resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, address := range strings.Split(target.Endpoint(), ",") {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		ip, err := netip.ParseAddr(host)
		if err != nil || ip.Is4() != (a.scheme == "ipv4") {
			return nil, errors.New(a.scheme + ": is no such address: " + address)
		}
		state.Addresses = append(state.Addresses, resolver.Address{Addr: net.JoinHostPort(host, port)})
	}
	return fixedResolver{}, cc.UpdateState(state)
}

type fixedResolver struct{}

func (fixedResolver) ResolveNow(resolver.ResolveNowOptions) {}
func (fixedResolver) Close()                                {}
