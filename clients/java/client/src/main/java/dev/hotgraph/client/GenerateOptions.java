package dev.hotgraph.client;

import java.time.Duration;
import java.util.Optional;

/** For one generation, instead of what the client was told. Does not change; each method makes another one. */
public final class GenerateOptions {
    /** All as the client was told, and no deadline. */
    public static final GenerateOptions DEFAULT = new GenerateOptions(null, null, null);

    private final Duration timeout;
    private final Resume resume;
    private final ResumePolicy policy;

    private GenerateOptions(Duration timeout, Resume resume, ResumePolicy policy) {
        this.timeout = timeout;
        this.resume = resume;
        this.policy = policy;
    }

    /** How long it may take from its start to its end, reconnections included. */
    public GenerateOptions withTimeout(Duration value) {
        if (value.isNegative() || value.isZero()) {
            throw new IllegalArgumentException("a timeout must be positive, not " + value);
        }
        return new GenerateOptions(value, resume, policy);
    }

    /** When it goes on after a lost server. */
    public GenerateOptions withResume(Resume value) {
        return new GenerateOptions(timeout, value, policy);
    }

    /** How far it goes after a lost server. */
    public GenerateOptions withResumePolicy(ResumePolicy value) {
        return new GenerateOptions(timeout, resume, value);
    }

    Optional<Duration> timeout() {
        return Optional.ofNullable(timeout);
    }

    Optional<Resume> resume() {
        return Optional.ofNullable(resume);
    }

    Optional<ResumePolicy> resumePolicy() {
        return Optional.ofNullable(policy);
    }
}
