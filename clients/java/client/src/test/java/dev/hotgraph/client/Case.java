package dev.hotgraph.client;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.lang.annotation.ElementType;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.api.extension.ExtensionContext;
import org.junit.jupiter.api.extension.TestWatcher;

/** The case of tests/interop/cases.json that a test shows; it is reported when the test has passed. */
@Target(ElementType.METHOD)
@Retention(RetentionPolicy.RUNTIME)
@ExtendWith(Case.Report.class)
@interface Case {
    String value();

    /** Writes to the file that HOTGRAPH_INTEROP_REPORT names, if it does. */
    final class Report implements TestWatcher {
        @Override
        public void testSuccessful(ExtensionContext context) {
            context.getTestMethod()
                    .map(method -> method.getAnnotation(Case.class))
                    .ifPresent(shown -> write("passed " + shown.value()));
        }

        static void write(String line) {
            String path = System.getenv("HOTGRAPH_INTEROP_REPORT");
            if (path == null) {
                return;
            }
            try {
                Files.writeString(Path.of(path), line + "\n", StandardOpenOption.APPEND);
            } catch (IOException failure) {
                throw new UncheckedIOException(failure);
            }
        }
    }
}
