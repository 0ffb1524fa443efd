# syntax=docker/dockerfile:1
# The agent in an image of about 60 MB: glibc, CA certificates, time zones and one binary; no shell, no root.
#
#   docker build -t walden .
#   docker run -v walden:/var/lib/walden -v ./walden.toml:/etc/walden/walden.toml:ro walden

# The build's glibc must not be newer than the runtime's: both are Debian 12.
FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY src src
# Cargo wants every target that Cargo.toml names to be there.
COPY benches/indexer.rs benches/indexer.rs
COPY tests/main.rs tests/main.rs
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --locked --profile dist --bin walden && cp target/dist/walden /walden
RUN install -d -m 0700 /state

# What the binary may need of it (a test compares): libc.so.6 libm.so.6 libgcc_s.so.1 ld-linux-x86-64.so.2
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="Walden" \
      org.opencontainers.image.description="Continuous WAL archiving and point-in-time recovery for PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /walden /usr/local/bin/walden
COPY config/walden.toml /usr/share/doc/walden/walden.toml
COPY LICENSE /usr/share/doc/walden/LICENSE
# Spool, state and, without settings, the archive: give it a volume. Numbers, so that runAsNonRoot can be checked.
COPY --from=build --chown=65532:65532 /state /var/lib/walden
WORKDIR /var/lib/walden
ENV HOME=/var/lib/walden
USER 65532:65532
VOLUME /var/lib/walden
EXPOSE 9847
# Asks the agent at metrics.listen: 0 healthy, 1 not, with the causes in the container's health log.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["/usr/local/bin/walden", "status"]
ENTRYPOINT ["/usr/local/bin/walden"]
CMD ["run"]
