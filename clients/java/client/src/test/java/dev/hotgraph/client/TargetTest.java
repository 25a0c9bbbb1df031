package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.net.URI;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import org.junit.jupiter.api.Test;

/** What targets are, and what a client refuses to be told. Nothing is connected to. */
class TargetTest {
    private static final String SOME = "127.0.0.1:1";

    /** A token goes in plain text to this host alone, unless one says so. */
    @Test
    @Case("token_in_the_clear")
    void tokensStayWithinThisHost() {
        for (String target : List.of(
                "gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1")) {
            HotgraphClient.Builder refused = HotgraphClient.builder(target).token("secret");
            assertThrows(IllegalArgumentException.class, refused::build, target);
            HotgraphClient.builder(target)
                    .token("secret")
                    .allowInsecureToken()
                    .build()
                    .close();
            HotgraphClient.builder(target).token("secret").tls().build().close();
        }
        for (String target : List.of(
                "unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1", "ipv6:[::1]:1,[::1]:2")) {
            HotgraphClient.builder(target).token("secret").build().close();
        }
    }

    /** Names and addresses that only look like loopback are other hosts. */
    @Test
    void onlyLoopbackIsLocal() {
        for (String target : List.of("127.0.0.1.example:1", "127.0.0.256:1", "::2", "[::1", "", "127.1.2.3,gpu:1")) {
            assertFalse(Target.isLocal(target), target);
        }
        for (String target : List.of("127.255.0.3:1", "::1", "[0:0:0:0:0:0:0:1]:5", "ipv4:127.0.0.1:1,127.0.0.2:1")) {
            assertTrue(Target.isLocal(target), target);
        }
    }

    /** Paths of Unix sockets become absolute and escaped; other targets stay as they are. */
    @Test
    void targetsAreGrpcs() {
        assertEquals("unix:/run/h.sock", Target.forGrpc("unix:/run/h.sock"));
        assertEquals("unix:/run/h.sock", Target.forGrpc("unix:///run/h.sock"));
        assertEquals("unix:/a%20b/50%25.sock", Target.forGrpc("unix:/a b/50%.sock"));
        String here = URI.create(Target.forGrpc("unix:h.sock")).getPath();
        assertEquals(Path.of("h.sock").toAbsolutePath().toString(), here);
        assertEquals("gpu:1", Target.forGrpc("gpu:1"));
        assertThrows(IllegalArgumentException.class, () -> Target.forGrpc("unix:"));
    }

    /** Lists of addresses that are none are refused. */
    @Test
    void addressListsAreChecked() {
        for (String target :
                List.of("ipv4:10.0.0.1", "ipv4:gpu:1", "ipv4:[::1]:1", "ipv6:127.0.0.1:1", "ipv4:1.2.3.4:99999")) {
            assertThrows(IllegalArgumentException.class, () -> HotgraphClient.connect(target), target);
        }
    }

    /** What cannot work is refused before anything is connected to. */
    @Test
    void settingsAreChecked() {
        Duration second = Duration.ofSeconds(1);
        for (HotgraphClient.Builder wrong : List.of(
                HotgraphClient.builder(""),
                HotgraphClient.builder(SOME).maxAttempts(0),
                HotgraphClient.builder(SOME).maxAttempts(6),
                HotgraphClient.builder(SOME).keepalive(Duration.ZERO, second),
                HotgraphClient.builder(SOME).keepalive(second, second.negated()))) {
            assertThrows(IllegalArgumentException.class, wrong::build);
        }
        assertThrows(IllegalArgumentException.class, () -> ResumePolicy.DEFAULT.withMaxLosses(-1));
        assertThrows(IllegalArgumentException.class, () -> GenerateOptions.DEFAULT.withTimeout(Duration.ZERO));
    }

    /** A session key that no header may hold goes as its SHA-256. */
    @Test
    void sessionKeysAreHeaders() {
        assertEquals("a key", CallSettings.sessionValue("a key"));
        for (String strange : List.of("ключ", " a", "a\n", "a\u007f")) {
            assertTrue(CallSettings.sessionValue(strange).matches("[0-9a-f]{64}"), strange);
        }
        assertEquals(
                "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c", CallSettings.sessionValue("é"));
    }
}
