package dev.hotgraph.client;

import dev.hotgraph.v1.Choice;
import dev.hotgraph.v1.Started;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;

/**
 * A server that was lost in the middle of an answer, when going on elsewhere was off, not possible or in vain. Code and
 * message are how the connection told it, which depends on what stands between client and server.
 */
public final class StreamLostException extends HotgraphException {
    private static final long serialVersionUID = 1;

    private final Started started;
    private final ArrayList<Choice> choices;

    StreamLostException(HotgraphException cause, Started started, List<Choice> choices) {
        super(cause);
        this.started = started;
        this.choices = new ArrayList<>(choices);
    }

    /** The first event, if it came. */
    public Optional<Started> started() {
        return Optional.ofNullable(started);
    }

    /** Every choice as far as it came. */
    public List<Choice> choices() {
        return List.copyOf(choices);
    }
}
