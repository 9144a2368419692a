//! Names that operator, worker and gateway must spell alike: labels, ports, paths, variables.

/// Label on everything owned by a placement: the placement's name.
pub const PLACEMENT: &str = "turret.dev/placement";
/// Label on a placement's Service (and so on its EndpointSlices): the placement's UID, which is
/// the audience of the tokens its workers accept.
pub const PLACEMENT_UID: &str = "turret.dev/placement-uid";
/// Annotation on the ConfigMap that carries the worker document: its sequence number.
pub const DOCUMENT_SEQUENCE: &str = "turret.dev/document-sequence";
/// Annotation on the ConfigMap that carries the worker document: its digest.
pub const DOCUMENT_DIGEST: &str = "turret.dev/document-digest";

/// Annotation on a placement: the operator leaves it and all it owns as they are. Any value but `false`.
pub const PAUSED: &str = "turret.dev/paused";
/// Annotation on both kinds: when its value changes, the object is looked at, and its workers look again at what failed. The
/// value that was handled is in `status.lastHandledReconcileAt`.
pub const RECONCILE_REQUESTED_AT: &str = "turret.dev/reconcile-requested-at";

/// Label that the API server gives every namespace: its name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Standard label: which application.
pub const APP_NAME: &str = "app.kubernetes.io/name";
/// Standard label: which component of it.
pub const APP_COMPONENT: &str = "app.kubernetes.io/component";
/// Standard label: who manages the object.
pub const APP_MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Port on which a worker serves inference.
pub const DATA_PORT: u16 = 8080;
/// Port on which a worker takes documents and reports its state.
pub const CONTROL_PORT: u16 = 8081;
/// Name of the data port in Services and Pods.
pub const DATA_PORT_NAME: &str = "http";
/// Name of the control port in Services and Pods.
pub const CONTROL_PORT_NAME: &str = "control";

/// Key in the ConfigMap's `binaryData`: the worker document as gzip of JSON.
pub const DOCUMENT_KEY: &str = "document.json.gz";
/// Key in the same `binaryData`: the hints as gzip of JSON, see [`crate::hints`].
pub const HINTS_KEY: &str = "hints.json.gz";
/// Where a worker pod finds its ConfigMap mounted.
pub const DOCUMENT_DIR: &str = "/etc/turret/document";
/// Where a worker pod finds its source volumes, one folder per name.
pub const VOLUMES_DIR: &str = "/var/lib/turret/volumes";
/// Where a worker pod finds the Secrets of its sources, one folder per name.
pub const SECRETS_DIR: &str = "/etc/turret/secrets";
/// Key of a Secret, and so the file in its folder, that holds a token.
pub const SECRET_KEY: &str = "token";
/// Where a worker pod keeps its disk tier.
pub const CACHE_DIR: &str = "/var/lib/turret/cache";

/// Header in which the gateway names the model it resolved (`group` or `group:lens`), so that a
/// body is passed on unchanged. Believed only with a valid token.
pub const MODEL_HEADER: &str = "x-turret-model";
/// Header of every answer: the digest of the lens that answered, absent for the bare base.
pub const LENS_DIGEST_HEADER: &str = "x-turret-lens-digest";
/// Header of an answer that came through the gateway: the worker that gave it.
pub const WORKER_HEADER: &str = "x-turret-worker";

/// Environment variable: the placement's namespace.
pub const ENV_NAMESPACE: &str = "TURRET_NAMESPACE";
/// Environment variable: the pod's name, which is the worker's name.
pub const ENV_WORKER_NAME: &str = "TURRET_WORKER_NAME";
/// Environment variable: the extended resource the pod was given (`nvidia.com/gpu`), absent for a CPU worker.
pub const ENV_ACCELERATOR: &str = "TURRET_ACCELERATOR";
/// Environment variable: `auto` (default), `cpu` or `cuda`. With `auto` a worker that was given an
/// accelerator and finds none refuses to start.
pub const ENV_DEVICE: &str = "TURRET_DEVICE";
/// Environment variable: compute threads; default from the container's CPU limit.
pub const ENV_THREADS: &str = "TURRET_THREADS";
/// Environment variable: folders, separated by `:`, below which `file://` sources may lie.
pub const ENV_FILE_ROOTS: &str = "TURRET_FILE_ROOTS";

/// Process exit code of a worker that cannot use the device it was given.
pub const EXIT_DEVICE: i32 = 78;

/// Name of every object a placement owns.
pub fn owned_name(placement: &str) -> String {
    format!("turret-{placement}")
}
