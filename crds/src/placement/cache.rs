//! The volume that a worker keeps fetched files on.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::ClaimRef;
use crate::quantity::{ByteQuantity, InvalidQuantity};

/// Of a volume of a declared size, a sixteenth is left for what is not a file: directories, locks, the file system itself.
const SPARE_PART: u64 = 16;
/// Of a large one no more than this, bytes.
const MOST_SPARE: u64 = 1 << 30;
/// But this part at least: what a file system keeps for itself grows with it (ext4: 1/64 for inodes, and a journal).
const LEAST_SPARE_PART: u64 = 32;

/// Where workers keep the files they fetch, and what they make of them: exactly one of the three. A change replaces the pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.emptyDir) ? 1 : 0) + (has(self.ephemeral) ? 1 : 0) + (has(self.persistentVolumeClaim) ? 1 : 0) == 1").message("cache is exactly one of emptyDir, ephemeral and persistentVolumeClaim"),
)]
pub struct Cache {
    /// A folder on the node's own disk, which is gone with the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirCache>,
    /// A volume of each worker's own, made with the pod and gone with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<EphemeralCache>,
    /// A claim that exists, and stays: a new worker finds what those before it fetched. All workers of the placement write
    /// to it, also the old and the new one while pods are replaced, so it must be ReadWriteMany where they may be on several
    /// nodes. Its file system must be able to lock files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimRef>,
}

/// A folder on the node's own disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirCache {
    /// The pod is evicted when it holds more. Absent: 1Gi more than `memory.diskBudget`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<ByteQuantity>,
}

/// A volume of each worker's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EphemeralCache {
    /// Class of the volume. Absent: the cluster's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("storageClassName is the name of a StorageClass: lower-case letters, digits, `-` and `.`"))]
    pub storage_class_name: Option<String>,
    /// Size of the volume.
    pub size: ByteQuantity,
}

impl Cache {
    /// How large the volume is declared to be, with the field that says it.
    pub fn declared_size(&self) -> Option<(&'static str, &ByteQuantity)> {
        let empty_dir = self.empty_dir.as_ref().and_then(|dir| dir.size_limit.as_ref());
        let ephemeral = self.ephemeral.as_ref().map(|volume| &volume.size);
        let empty_dir = empty_dir.map(|size| ("emptyDir.sizeLimit", size));
        empty_dir.or_else(|| ephemeral.map(|size| ("ephemeral.size", size)))
    }

    /// Whether it is on the node's own disk, so that what it takes is ephemeral storage of the pod.
    pub fn is_on_node(&self) -> bool {
        self.ephemeral.is_none() && self.persistent_volume_claim.is_none()
    }
}

/// Bytes that whole files may take of a volume of this size.
///
/// # Errors
/// When the size cannot be read.
pub fn bytes_for_files(size: &ByteQuantity) -> Result<u64, InvalidQuantity> {
    let bytes = size.bytes()?;
    Ok(bytes - (bytes / SPARE_PART).min(MOST_SPARE).max(bytes / LEAST_SPARE_PART))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cache(value: serde_json::Value) -> Cache {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_declared_size_is_found_with_its_field_and_leaves_room_for_what_is_no_file() {
        let limited = cache(json!({"emptyDir": {"sizeLimit": "64Mi"}}));
        let (field, size) = limited.declared_size().unwrap();
        assert_eq!((field, bytes_for_files(size)), ("emptyDir.sizeLimit", Ok(60 << 20)));
        let volume = cache(json!({"ephemeral": {"size": "200Gi"}}));
        let (field, size) = volume.declared_size().unwrap();
        assert_eq!((field, bytes_for_files(size)), ("ephemeral.size", Ok((200 << 30) - (200 << 30) / 32)));
        for unknown in [json!({"emptyDir": {}}), json!({"persistentVolumeClaim": {"claimName": "c"}})] {
            assert_eq!(cache(unknown).declared_size(), None);
        }
        assert!(bytes_for_files(&ByteQuantity("much".into())).is_err());
    }

    #[test]
    fn only_a_folder_of_the_node_is_ephemeral_storage() {
        assert!(Cache::default().is_on_node() && cache(json!({"emptyDir": {}})).is_on_node());
        assert!(!cache(json!({"ephemeral": {"size": "1Gi"}})).is_on_node());
        assert!(!cache(json!({"persistentVolumeClaim": {"claimName": "c"}})).is_on_node());
    }
}
