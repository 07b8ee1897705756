package ai.edgeseq;

import java.nio.charset.StandardCharsets;

/** What the runtime refused: a sentence, and a status of edgeseq.h. */
public final class EdgeseqException extends RuntimeException {
    private static final long serialVersionUID = 1L;
    private final int status;

    EdgeseqException(int status, byte[] sentence) {
        super(new String(sentence, StandardCharsets.UTF_8));
        this.status = status;
    }

    /** Class in the low byte (9 is the device), detail in the next. */
    public int status() {
        return status;
    }
}
