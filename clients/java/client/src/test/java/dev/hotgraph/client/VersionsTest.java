package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertNotNull;

import io.grpc.ManagedChannel;
import org.junit.jupiter.api.Test;

/** What the report of tests/interop says of this language. */
class VersionsTest {
    /** Both versions are known. */
    @Test
    void versionsAreReported() {
        String grpc = ManagedChannel.class.getPackage().getImplementationVersion();
        assertNotNull(grpc);
        Case.Report.write("language Java " + System.getProperty("java.version"));
        Case.Report.write("library grpc-java " + grpc);
    }
}
