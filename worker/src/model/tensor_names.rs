//! What the tensors of a base are called in files of different origin.

use super::config::Architecture;

/// What this architecture calls a tensor of the files; `None` for one of the image encoder. Gemma 3's text model lies
/// inside of one with images under one prefix as transformers 4 wrote it and under another as 5 writes it.
pub(super) fn own_name(architecture: Architecture, tensor: &str) -> Option<String> {
    if architecture != Architecture::Gemma3 {
        return Some(tensor.into());
    }
    let inside = tensor.strip_prefix("model.").unwrap_or(tensor);
    if inside.starts_with("vision_tower.") || inside.starts_with("multi_modal_projector.") {
        return None;
    }
    let own = match (tensor.strip_prefix("language_model."), tensor.strip_prefix("model.language_model.")) {
        (Some(own), _) => own.into(),
        (_, Some(own)) => format!("model.{own}"),
        _ => tensor.into(),
    };
    Some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_of_gemma_3_with_images_have_the_text_model_s_names() {
        let name = |tensor| own_name(Architecture::Gemma3, tensor);
        for (tensor, own) in [
            ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(name(tensor).as_deref(), Some(own));
        }
        assert_eq!(name("vision_tower.vision_model.embeddings.patch_embedding.weight"), None);
        assert_eq!(name("model.multi_modal_projector.mm_input_projection_weight"), None);
        let of_llama = own_name(Architecture::Llama, "vision_tower.weight");
        assert_eq!(of_llama.as_deref(), Some("vision_tower.weight"), "refused by its name later");
    }
}
